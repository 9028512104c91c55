"""Wrong input at the shell: one clear line that says what to do, no traceback, an exit code above 0."""
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medvl.commands import app
from medvl.core.errors import DataError
from medvl.core.run import Run
from medvl.data.phantom.breast_dataset import write_phantom
from medvl.data.samples.targets import with_labels
from medvl.data.phantom.kinds import prepared_phantom
from medvl.run.parameters import RefusedError, check_parameters
from medvl.run.runner import experiments


def medvl(*words, outputs=None):
    "(exit code, all that is printed)"
    got = CliRunner().invoke(app, [str(w) for w in words], env={'MEDVL_OUTPUTS': str(outputs)} if outputs else None)
    assert got.exception is None or isinstance(got.exception, SystemExit), repr(got.exception)
    return got.exit_code, got.output


def refused(says, *words, outputs=None):
    code, said = medvl(*words, outputs=outputs)
    assert code == 2 and says in ' '.join(said.split()) and 'Traceback' not in said, said


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A folder with blanks and umlauts that holds a good run and damaged ones."
    home = tmp_path_factory.mktemp('r')/'Läufe von gestern'
    run = Run.create('zero_shot', dict(n_boot=2), home)
    run.begin('notebook'); run.metric('mass_auroc', .6, low=.5, high=.7); run.write('finished'); run.end('done')
    for name in ('no_params', 'torn_params', 'odd_metrics'): shutil.copytree(run.folder, home/name)
    (home/'no_params'/'params.json').unlink(); (home/'torn_params'/'params.json').write_text('xx'); (home/'odd_metrics'/'metrics.json').write_text('[]')
    os.symlink('/nowhere', home/'dangling')
    return home, run.folder.name


def test_damaged_runs_do_not_hide_the_others(runs):
    home, good = runs
    code, said = medvl('runs', 'list', '--outputs', home)
    assert code == 0 and good in said and all(f'medvl: {n} is damaged and left out' in said for n in ('no_params', 'torn_params', 'odd_metrics'))
    assert medvl('runs', 'best', 'mass_auroc', '--outputs', home)[0] == 0
    refused('holds no metrics: it was changed. Restore it', 'runs', 'show', 'odd_metrics', '--outputs', home)
    refused('Restore it', 'runs', 'show', 'torn_params', '--outputs', home)


@pytest.mark.parametrize('words, says', [
    (('list', '--state', 'don'), "Unknown state 'don'. Did you mean 'done'?"), (('list', '--experiment', 'zero_shoot'), "Did you mean 'zero_shot'?"),
    (('list', '--metric', 'mass_auroq'), "Did you mean 'mass_auroc'?"), (('list', '--sort', 'foo'), 'Unknown order'), (('list', '--format', 'foo'), 'Unknown format'),
    (('list', '--groups', '/nowhere.csv'), 'No such file'), (('best', 'nothing'), "Unknown metric 'nothing'. There are: mass_auroc"), (('show', 'nix'), 'Unknown run'), (('compare', 'a', 'b'), 'Unknown run')])
def test_typos_about_runs(runs, words, says):
    refused(says, 'runs', *words, '--outputs', runs[0])


def test_a_folder_of_runs_that_is_not_there(runs, tmp_path):
    (tmp_path/'file').touch()
    for bad in (tmp_path/'absent', tmp_path/'file'):
        for words in (('list',), ('list', '--format', 'csv'), ('best', 'x')): refused(f'there is no folder {bad}', 'runs', *words, '--outputs', bad)
    assert medvl('runs', 'list', outputs=tmp_path/'not yet')[1] == 'No runs.\n' # the default need not be there


def test_tables_of_groups(runs, tmp_path):
    for name, content, says in (('empty', b'group,run\n', 'the table has no rows'), ('null', b'', 'is no CSV table'), ('latin', 'group,run\nGröße,zero\n'.encode('latin-1'), 'is not UTF-8 text'),
                                ('columns', b'gruppe,run\na,b\n', "Did you mean 'group'")):
        (tmp_path/f'{name}.csv').write_bytes(content)
        refused(says, 'runs', 'list', '--groups', tmp_path/f'{name}.csv', '--outputs', runs[0])


@pytest.mark.parametrize('words, says', [
    (('-p', 'n_boot=3'), 'Name an experiment'), (('--plan',), 'Name an experiment'), (('zero_shot', '--timeout', '-1'), 'more than 0'), (('zero_shot', '-p', 'foo'), 'name=value'),
    (('zero_shoot',), 'Did you mean'), (('zero_shot', '-f', '/nowhere.yaml'), 'cannot be read'), (('./nowhere.ipynb',), 'There is no notebook'), (('zero_shot', '-p', 'split=tst'), 'Did you mean')])
def test_a_run_that_cannot_begin(words, says, tmp_path):
    refused(says, 'run', *words, '--outputs', tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_sweep_that_cannot_begin(tmp_path):
    refused('Name an experiment, or a sweep to resume', 'sweep')
    refused('gpus must be at least 0', 'sweep', 'zero_shot', '-g', 'n_boot=2,3', '--gpus', '-1', '--outputs', tmp_path)


def test_a_path_is_looked_at_before_anything_runs(tmp_path):
    check = lambda name, **given: check_parameters(experiments()[name], given)
    for name, given, says in (('retrieval', dict(data='/nowhere'), 'no such file or folder. It must be: prepared folder with reports'), ('retrieval', dict(data=str(tmp_path)), 'it has no dataset.json. `medvl run prepare'),
                              ('mammo_clip', dict(data='/nowhere'), 'no such file'), ('probe_bench', dict(sets=[str(tmp_path)]), 'no dataset.json'), ('finetune', dict(table='/nowhere.csv'), 'CSV with image_id'),
                              ('grounding', dict(protocol='phrases', phrases='/nowhere'), 'no such file'), ('zero_shot', dict(model='nix'), 'no such folder, file or run'), ('compare_runs', dict(runs=['nix']), 'no such folder, file or run')):
        with pytest.raises(RefusedError) as e: check(name, **given)
        assert says in str(e.value), str(e.value)
    assert check('zero_shot', model='owner/name')['model'] == 'owner/name' and check('pretrain', reports='none', samples='mixture')['reports'] == 'none'
    assert check('xvl_learns', data=str(tmp_path)) and check('prepare', data=str(tmp_path), out='/nowhere/yet')


def test_a_table_of_labels(tmp_path):
    data = prepared_phantom(tmp_path/'p', 3, (48, 32))
    for name, content, says in (('latin', 'image_id,label_größe\na,1\n'.encode('latin-1'), 'Save the table as UTF-8'), ('semi', b'image_id;label_x\na;1\n', 'semicolons'), ('null', b'', 'empty')):
        (tmp_path/f'{name}.csv').write_bytes(content)
        with pytest.raises(DataError, match=says): with_labels(data, tmp_path/f'{name}.csv')
    with pytest.raises(DataError, match='a folder, not a table'): with_labels(data, tmp_path)


@pytest.fixture(scope='module')
def archive(tmp_path_factory):
    home = tmp_path_factory.mktemp('a')/'Archiv, 1. Äußeres'
    write_phantom(home, 2, (64, 48), fmt='dicom', progress=False)
    for f in home.glob('*.csv'): f.unlink()
    os.symlink('/nowhere.dcm', home/'lost.dcm')
    return home


def test_an_archive_with_a_link_that_leads_nowhere(archive, tmp_path):
    code, said = medvl('index', archive, '-o', tmp_path/'an index', '--jobs', 1, outputs=tmp_path)
    assert code == 0 and 'a link that leads nowhere' in (tmp_path/'an index'/'index_aside.csv').read_text()
    assert f"-p 'data={tmp_path/'an index'}'" in said # what to do next can be pasted


def test_tables_of_reports(archive, tmp_path):
    for name, content, says in (('not.xlsx', b'foo', 'not an Excel file'), ('null.csv', b'', 'the file is empty'), ('latin.csv', 'accession,report\n1,Größe\n'.encode('latin-1'), 'Save the table as UTF-8'),
                                ('one.csv', b'accession,report\nX1,a\n', 'not one of 1 reports')):
        (tmp_path/name).write_bytes(content)
        refused(says, 'index', archive, '--reports', tmp_path/name, '-o', tmp_path/'out', '--jobs', 1, outputs=tmp_path)
    refused('this is a folder, not a table', 'index', archive, '--reports', tmp_path, '-o', tmp_path/'out', '--jobs', 1, outputs=tmp_path)
    refused('does not exist', 'index', tmp_path/'absent'); refused('this is a file', 'index', tmp_path/'one.csv')


def test_a_number_of_processes(archive, tmp_path):
    for n in ('0', '-3'):
        refused('give at least 1, or -1', 'index', archive, '--jobs', n); refused('give at least 1, or -1', 'phantom', tmp_path/'p', '--jobs', n)


def test_a_size_of_nothing_leaves_nothing(archive, tmp_path):
    source = write_phantom(tmp_path/'Quelle ä', 2, (64, 48), progress=False)
    refused('at least 1 pixel', 'prepare', source, tmp_path/'out', '--size', 0, 48, '--jobs', 1, outputs=tmp_path)
    assert medvl('prepare', source, tmp_path/'out', '--size', 64, 48, '--jobs', 1, outputs=tmp_path)[0] == 0


def test_a_place_that_cannot_be_written_is_named_as_it_was_given(tmp_path):
    from medvl.core.paths import write_json
    from medvl.run.cli import error_line
    with pytest.raises(OSError) as e: write_json(Path("/proc/x.png"), {})
    assert error_line(e.value).startswith('/proc/x.png: ')
