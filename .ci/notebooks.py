"""Run notebooks and store their outputs, or check that notebooks and modules agree. Developer tool; medvl does not import it.

    python .ci/notebooks.py refresh nbs/100_data.dicom.ipynb ...   # run, store the outputs, clean
    python .ci/notebooks.py export nbs/100_data.dicom.ipynb ...    # write only these modules
"""
import os
import sys
from pathlib import Path


def export(path):
    from nbdev.export import nb_export
    nb_export(path)


def refresh(path):
    "Execute one notebook in its own folder as nbdev_test does, keep every output, then clean the metadata."
    os.environ.update(IN_TEST='1', OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1'))
    from execnb.nbio import write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    from nbdev.process import NBProcessor, nb_lang
    path = Path(path).resolve()
    flags = set(get_config().tst_flags.split())
    nb = NBProcessor(path, rm_directives=False, process=True).nb

    def skip(cell):
        d = getattr(cell, 'directives_', {}) or {}
        return cell.cell_type != 'code' or d.get('eval:', ['true'])[0] == 'false' or bool(flags & set(d)) or 'nbdev_export(' in cell.source
    shell = CaptureShell(path=path.parent, mpl_format='png')
    old = os.getcwd()
    os.chdir(path.parent)
    try:
        shell.run_all(nb, exc_stop=True, preproc=lambda c: skip(c))
    finally:
        os.chdir(old)
    if shell.exc:
        raise SystemExit(f'{path.name} failed:\n{shell.prettytb(path)}')
    for cell in nb.cells:
        for key in ('directives_', 'idx_'):
            cell.pop(key, None)
    clean_nb(nb, allowed_metadata_keys=[], allowed_cell_metadata_keys=['tags'])
    write_nb(nb, path)
    assert nb_lang(nb) == 'python'


def main():
    command, *paths = sys.argv[1:]
    for path in paths:
        {'export': export, 'refresh': refresh}[command](path)
        print(command, path, 'ok')


if __name__ == '__main__':
    main()
