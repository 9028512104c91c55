"""A parameter that would have no effect is refused, and says what it needs; none waits in silence."""
import re

import pytest
from typer.testing import CliRunner

from medvl.run.cli import app
from medvl.run.parameters import Parameter, RefusedError, check_needs, check_parameters, notebook_parameters
from medvl.run.runner import experiments

NEED = re.compile(r'(?:needs|not with) `([^`]+)`')


def check(name, **given):
    said = []
    check_parameters(experiments()[name], given, say=said.append)
    return said


def test_a_layout_without_data_makes_no_phantom(tmp_path):
    got = CliRunner().invoke(app, ['run', 'prepare', '-p', 'layout=vindr', '--outputs', str(tmp_path)])
    assert got.exit_code == 2 and 'layout' in got.output and 'give -p data=' in got.output and not list(tmp_path.iterdir())


@pytest.mark.parametrize('name, given, says', [
    ('prepare', dict(layout='vindr'), 'give -p data='), ('prepare', dict(reuse='/tmp'), 'give -p data='), ('prepare', dict(source='RSNA'), 'give -p data='),
    ('prepare', dict(overwrite=True), 'give -p out='), ('localized', dict(data='/tmp'), 'add -p phantom=false'), ('localized', dict(phantom=False), 'give -p data='),
    ('vqa', dict(folder='/tmp'), 'add -p release=vqa_rad'), ('vqa', dict(release='slake'), 'give -p folder='), ('vqa', dict(data='/tmp', release='slake', folder='/tmp'), 'release=phantom'),
    ('bert_pretrain', dict(codes='/tmp'), 'add -p source=codes'), ('bert_pretrain', dict(data='/tmp', source='codes'), 'source=reports'),
    ('finetune', dict(model='/tmp', encoder='efficientnet-b2'), 'leave one of the two out'), ('finetune', dict(fold=2), 'give -p folds='),
    ('grounding', dict(truth_file='/tmp/x'), 'add -p protocol=chexlocalize'), ('generate', dict(how='greedy', beams=5), 'add -p how=beam'), ('pretrain', dict(host=1), 'add -p hosts='),
    ('cardiomegaly', dict(rho=.5), 'give -p shortcut='), ('a2i2_learns', dict(model='/tmp', variants=['view']), 'leave one of the two out'), ('paper_tables', dict(model='/tmp'), 'give -p vindr=')])
def test_traps(name, given, says):
    with pytest.raises(RefusedError, match='has no effect') as e: check(name, **given)
    assert says in str(e.value)


def test_what_is_needed_may_be_there():
    check('prepare', layout='vindr', data='/tmp', reuse='/tmp', source='A'); check('localized', phantom=False, data='/tmp'); check('vqa', release='slake', folder='/tmp')
    check('pretrain', hosts=2, host=1, meet='a:1'); check('pretrain', hosts=1, host=0, meet='a:1', shared='/tmp'); check('grounding', protocol='phrases', phrases='/tmp/x'); check('generate', how='beam', beams=5)
    for name in experiments(): check(name)


def test_a_phantoms_parameter_beside_data_is_said(tmp_path):
    (tmp_path/'dataset.json').touch() # looks like a prepared folder
    assert check('prepare', data='/tmp', exams=64, difficulty='hard') == ["exams=64 says how a phantom is made; data are given, so it has no effect.",
                                                                         "difficulty='hard' says how a phantom is made; data are given, so it has no effect."]
    assert check('prepare', exams=64) == [] and check('prepare', data='/tmp', seed=3) == [] # the seed deals the split, too
    assert len(check('generate', data=str(tmp_path), count=50)) == len(check('xvl_learns', data='/tmp', images=50)) == 1


def test_what_a_help_names_is_a_parameter():
    named = 0
    for name, path in experiments().items():
        known = {p.name: p for p in notebook_parameters(path)}
        for p in known.values():
            for need in NEED.findall(p.help):
                for other in re.split('=|>', need)[0].split(' or '): assert other in known, (name, p.name, other)
                named += 1
                _, equals, wanted = need.partition('=')
                for w in wanted.split(' or ') if equals else (): # a value that the other may have
                    q = known[need.partition('=')[0]]
                    assert not q.choices or w in [str(c) for c in q.choices], (name, p.name, need)
    assert named > 40


def test_a_need_is_held_against_what_is_there():
    p = Parameter('a', 'int', 0, 'needs `b or c`: x')
    for there in (dict(b=1), dict(c=[2]), dict(b='', c='x')): check_needs(p, {'a': 1, **there})
    for lack in ({}, dict(b=0), dict(b='', c=[])):
        with pytest.raises(RefusedError): check_needs(p, {'a': 1, **lack})
        check_needs(p, {'a': 0, **lack}) # not changed
