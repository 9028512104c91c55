"""The lowest versions that settings.ini allows, one `name==version` a line: `make lowest` installs them and runs a quick subset.
A version with fewer digits is the first release of that line (`numpy>=2` is `numpy==2.0.*`, of which pip takes the last patch)."""
import configparser
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lowest(requirement):
    "'numpy>=2' -> 'numpy==2.0.*'; 'nbdev==2.4.14' stays; 'fastcore<2' stays."
    name, rest = re.match(r'([A-Za-z0-9_.\-\[\]]+)(.*)', requirement).groups()
    low = re.search(r'>=([0-9.]+)', rest)
    if not low: return requirement
    digits = low[1].split('.') + ['0']*(2 - len(low[1].split('.')))
    return f'{name}=={".".join(digits)}' + ('' if len(digits) > 2 else '.*')


def requirements():
    "Requirements of settings.ini, the developers' too."
    config = configparser.ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    section = config['DEFAULT']
    return section['requirements'].split() + section['dev_requirements'].split()


if __name__ == '__main__': sys.stdout.write('\n'.join(map(lowest, requirements())) + '\n')
