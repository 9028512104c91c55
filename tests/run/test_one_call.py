"""One call: report, answer and check of a loaded model, from Python and from the shell; what cannot be asked is said."""
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import medvl
from medvl.api import Model, Written
from medvl.core.errors import DataError
from medvl.evaluate.protocols.sentence_check import candidate_sentences, check_sentences, contradicts, rival_sentences, sentence_claims
from medvl.evaluate.stats.selection import Threshold
from medvl.data.text.label_rules import label_rules
from medvl.methods.base import Method
from medvl.methods.error_detector import ErrorDetector
from medvl.methods.recipes import new_method

TEXTS = ['Small left pleural effusion. No pneumothorax.', 'The heart is enlarged. No effusion.', 'Is there a right effusion? Yes. No. Left.']
FILM = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
UNTRAINED = {'trained_on': 'nothing: its weights are initial ones'}


@pytest.fixture(scope='module')
def models():
    return {n: Model(new_method(n, 'smoke', [*TEXTS, *candidate_sentences()]), 'resize_v1', (64, 64), card=UNTRAINED)
            for n in ('writer', 'answerer', 'xvl', 'clip', 'simclr')}


class Side(Method):
    "Says 'right' where the image is bright."
    def __init__(self, looks=True):
        super().__init__()
        self.looks, self.anchor = looks, torch.nn.Parameter(torch.zeros(1))

    def read_images(self, images): return {'x': (images.float().mean((1, 2, 3)) > 100).float() * 2 - 1}
    def read_texts(self, texts): return {'says': torch.tensor([float('right' in t.lower()) - float('left' in t.lower()) for t in texts])}
    def match(self, images, texts): return images['x'][:, None] * texts['says'] * self.looks


def film(grey): return torch.full((1, 1, 8, 8), grey, dtype=torch.uint8)


# check --------------------------------------------------------------------------------------------------------------
def test_the_wrong_side_is_doubted_and_the_right_one_offered():
    for grey, said, right in ((200, 'left', 'right'), (20, 'right', 'left')):
        wrong = check_sentences(Side(), film(grey), f'No pneumothorax. Small {said} effusion.')
        assert wrong.doubtful == [f'Small {said} effusion.'] and wrong.table.better[1][0] == f'Small {right} effusion.'
        assert check_sentences(Side(), film(grey), f'Small {right} effusion.').doubtful == []
    blind = check_sentences(Side(looks=False), film(200), 'Small left effusion.')
    assert blind.doubtful == [] and blind.table.doubt[0] == 0 # what does not look cannot doubt


def test_contradictions_are_of_one_finding_and_one_side():
    read = lambda t: sentence_claims(t, label_rules('chest'))
    no = lambda a, b: contradicts(read(a), read(b)) or contradicts(read(b), read(a))
    assert no('Left effusion.', 'No effusion.') and no('Possible effusion.', 'No pleural effusion.')
    assert no('Left effusion.', 'No left effusion.') and not no('Left effusion.', 'No right effusion.')
    assert not no('Left effusion.', 'No pneumothorax.') and not no('No effusion.', 'No pneumothorax.')
    assert no('No acute cardiopulmonary abnormality.', 'There is a fracture.') and not no('No acute cardiopulmonary abnormality.', 'No edema.')
    breast = rival_sentences(['A mass in the left breast.'], candidate_sentences('breast'), 'breast')[0]
    assert breast[0] and all('right' not in c for c in breast[0]) and breast[1] == 'A mass in the right breast.'


def test_without_a_contradiction_only_the_worst_of_the_candidates_is_doubted():
    found = check_sentences(Side(), film(200), 'Discussed, wires left.', [f'right {w}' for w in 'abcdefghij'])
    assert found.table.against[0] == 'its sides exchanged'
    found = check_sentences(Side(), film(20), 'The wires are old.', [f'left {i}nd' for i in 'abcdefghijklmnopqrstuvwxyz'])
    assert found.doubtful == ['The wires are old.'] and found.table.against[0] == 'all 26 candidates' and len(found.table.better[0]) == 3
    found = check_sentences(Side(), film(20), 'The wires are old.', ['left one', *[f'right {i}nd' for i in 'abcdefgh']])
    assert found.doubtful == []
    alone = check_sentences(Side(), film(20), 'The wires are old.', ['The wires are old.'])
    assert np.isnan(alone.table.doubt[0]) and alone.doubtful == [] and 'nothing to compare with' in alone.table.against[0]


def test_a_threshold_comes_from_validation_reports():
    line = Threshold('wrong sentence', 5., 'youden', None, 'sentence', 40, 20)
    found = check_sentences(Side(), film(200), 'Small left effusion.', threshold=line)
    assert found.doubtful == [] and '40 validation sentences' in found.rule
    with pytest.raises(TypeError, match='chosen on validation'): check_sentences(Side(), film(200), 'Effusion.', threshold=.5)


@pytest.mark.parametrize('report', ['', '  \n', None, float('nan'), '1. 2. --', '...', 'ok.', '12 / 13'])
def test_a_report_without_words_is_refused(models, report):
    with pytest.raises(DataError, match='report'): models['xvl'].check(FILM, report)


def test_short_long_and_odd_reports_have_a_result(models):
    one = models['xvl'].check(FILM, 'Effusion')
    assert len(one.table) == 1 and np.isfinite(one.table.doubt[0])
    long = models['xvl'].check(FILM, 'No effusion. ' * 100 + 'There is a fracture ' + 'of the ribs and ' * 100 + 'ends.')
    assert len(long.table) == 101 and long.table.cut.tolist() == [False] * 100 + [True] and 'longer than is read' in repr(long)
    some = models['xvl'].check(FILM, 'OK. No effusion.\n2.\nNo edema.')
    assert some.table.doubt.notna().sum() == 2 and not some.table.doubtful[some.table.doubt.isna()].any()
    same = models['xvl'].check(FILM, 'FINDINGS: No effusion. 1. The heart is enlarged.\n\nIMPRESSION: None.')
    assert same.table.sentence[0] == 'No effusion.' and same.report[slice(*same.table.loc[0, ['start', 'stop']])] == 'FINDINGS: No effusion.'


def test_numbers_do_not_depend_on_the_other_sentences(models):
    both = models['xvl'].check(FILM, 'No effusion. The heart is enlarged.').table.doubt
    alone = [models['xvl'].check(FILM, t).table.doubt[0] for t in ('No effusion.', 'The heart is enlarged.')]
    np.testing.assert_allclose(both, alone, atol=1e-5)


def test_check_names_its_score_and_says_what_was_learnt(models):
    matched, cosine = models['xvl'].check(FILM, 'No effusion.', score='match'), models['clip'].check(FILM, 'No effusion.')
    assert (matched.score, cosine.score) == ('match', 'cosine') and 'by cosine' in repr(cosine)
    assert any('learnt nothing' in n for n in matched.notes)
    assert models['xvl'].check(FILM, 'No effusion.').score == 'cosine' and ErrorDetector.check_by == 'match' # measured: nbs/518b
    with pytest.raises(TypeError, match='by cosine'): models['simclr'].check(FILM, 'No effusion.')
    with pytest.raises(ValueError, match='cosine'): models['xvl'].check(FILM, 'No effusion.', score='cosin')
    with pytest.raises(TypeError, match='match'): models['simclr'].check(FILM, 'No effusion.', score='match')
    known = Model(models['clip'].method, 'resize_v1', (64, 64), card={'trained_on': '9 images of 3 patients (phantom)'})
    assert any('phantoms only' in n for n in known.check(FILM, 'No effusion.').notes)


def test_candidates_from_a_table_and_from_sentences(models, tmp_path):
    (tmp_path/'t.txt').write_text('own | Effusion | present | there is fluid, an effusion.\nown | Effusion | absent | no effusion at all.\n')
    found = models['xvl'].check(FILM, 'Large effusion.', tmp_path/'t.txt')
    assert found.table.against[0] == '1 that contradict'
    assert models['xvl'].check(FILM, 'Large effusion.', ['No effusion.', 'Without effusion.']).table.against[0] == '2 that contradict'
    with pytest.raises(ValueError, match='chest'): models['xvl'].check(FILM, 'Large effusion.', 'chset')
    with pytest.raises(DataError, match='among the candidates'): models['xvl'].check(FILM, 'Large effusion.', [])
    (tmp_path/'bad.txt').write_text('no table')
    with pytest.raises(DataError, match='no row of sentences'): models['xvl'].check(FILM, 'Large effusion.', str(tmp_path/'bad.txt'))


def test_pages_show_reports_as_text(models):
    evil = '<script>alert(1)</script> "left" effusion & $x_1$ \\frac{ $. No edema.'
    page = models['xvl'].check(FILM, evil)._repr_html_()
    assert '<script' not in page and '&lt;script&gt;' in page
    page = Written(evil, FILM, 'writer', evil, [evil])._repr_html_()
    assert '<script' not in page and page.count('&lt;script&gt;') == 3
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    found = check_sentences(Side(), film(200), 'A $left_ {effusion}$ <b>. $ left.')
    found.maps = {0: np.ones((2, 2)), 1: np.ones((2, 2))}
    assert found.doubtful and '<b>' not in found._repr_html_() # drawn, although it looks like a formula
    assert plt.get_fignums() == before


# report and answer -------------------------------------------------------------------------------------------------
def test_report_and_answer(models):
    told = models['writer'].report(FILM, max_length=10)
    assert isinstance(told, Written) and str(told) == told.text and 'learnt nothing' in repr(told) and told.image.shape == (64, 64)
    drawn = [models['writer'].report(FILM, how='sample', seed=s, max_length=10).text for s in (0, 0)]
    assert drawn[0] == drawn[1]
    begun = models['writer'].report(FILM, 'no effusion', max_length=10)
    assert begun.text.startswith('no effusion') and 'beginning was given' in repr(begun) and 'Asked' not in repr(begun)
    chosen = models['answerer'].answer(FILM, 'is there an effusion?', ['Yes', 'No'])
    assert chosen.text in ('Yes', 'No') and 'chosen among 2' in chosen.by
    assert 'written freely' in models['answerer'].answer(FILM, 'is there an effusion?').by
    long = models['answerer'].answer(FILM, 'is there an effusion ' * 100 + '?', ['Yes', 'No'])
    assert 'were read' in long.notes[0]


def test_a_report_grows_in_one_place_of_a_notebook(models):
    "A real kernel keeps one output, the last; the text is that of the greedy search; a draw is that of its seed."
    import nbformat
    from nbclient import NotebookClient
    for more in ({}, dict(how='sample', seed=4)):
        assert models['writer'].report(FILM, watch=True, max_length=8, **more).text == models['writer'].report(FILM, max_length=8, **{'how': 'greedy', **more}).text
    code = "from medvl.api import watched\nlast = watched(iter(['small', 'small left', 'small left <b>']))"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code), nbformat.v4.new_code_cell('last')])
    NotebookClient(book, timeout=300, kernel_name='python3').execute()
    first, second = (c.outputs for c in book.cells)
    assert len(first) == 1 and first[0]['data']['text/html'] == '<p>small left &lt;b&gt;</p>' and 'small left <b>' in second[0]['data']['text/plain']
    with pytest.raises(ValueError, match='settles'): models['writer'].report(FILM, watch=True, how='beam')


def test_an_examination_is_written_about():
    views = ('L-CC', 'L-MLO', 'R-CC', 'R-MLO')
    model = Model(new_method('writer', 'smoke', TEXTS, views=views), 'resize_v1', (64, 64))
    one, four = model.report({'L-CC': FILM}, max_length=8), model.report({v: np.roll(FILM, k) for k, v in enumerate(views)}, max_length=8)
    assert isinstance(one.text, str) and isinstance(four.text, str)
    with pytest.raises(ValueError, match='L-MLO'): model.report({'front': FILM})
    with pytest.raises(ValueError, match='views missing'): model.report({})


@pytest.mark.parametrize('name, ask, error, says', [
    ('xvl', lambda m: m.report(FILM), TypeError, 'The writer can'), ('writer', lambda m: m.answer(FILM, 'where?'), TypeError, 'The answerer can'),
    ('answerer', lambda m: m.report(FILM), ValueError, 'give prompt='), ('writer', lambda m: m.report(FILM, ' '), ValueError, 'prompt is empty'),
    ('writer', lambda m: m.report(FILM, beems=2), ValueError, 'beams'), ('writer', lambda m: m.report(FILM, min_length=500), ValueError, 'must fit'),
    ('writer', lambda m: m.report([FILM, FILM]), ValueError, 'one image'), ('answerer', lambda m: m.answer([FILM], 'where?'), ValueError, 'one image'),
    ('xvl', lambda m: m.check([FILM], 'No edema.'), ValueError, 'one image'), ('answerer', lambda m: m.answer(FILM, '?'), ValueError, 'question is empty'),
    ('answerer', lambda m: m.answer(FILM, None), ValueError, 'question is empty'), ('answerer', lambda m: m.answer(FILM, 'where?', []), ValueError, 'without candidates'),
    ('answerer', lambda m: m.answer(FILM, 'where?', 'yes'), ValueError, 'list of candidates'), ('answerer', lambda m: m.answer(FILM, 'where?', ['yes', '']), ValueError, 'candidate is empty')])
def test_what_cannot_be_asked_is_said(models, name, ask, error, says):
    with pytest.raises(error, match=says): ask(models[name])


def test_an_image_that_cannot_be_read_is_named(models, tmp_path):
    (tmp_path/'x.png').write_bytes(b'no picture')
    for ask in (lambda p: models['writer'].report(p), lambda p: models['answerer'].answer(p, 'where?'), lambda p: models['xvl'].check(p, 'No edema.')):
        with pytest.raises((DataError, OSError), match='x.png'): ask(tmp_path/'x.png')
        with pytest.raises((DataError, OSError), match='absent.png'): ask(tmp_path/'absent.png')


# the shell ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def saved(models, tmp_path_factory):
    import cv2
    folder = tmp_path_factory.mktemp('saved')
    cv2.imwrite(str(folder/'film.png'), FILM)
    for name in ('writer', 'answerer', 'xvl'): models[name].save_pretrained(folder/name)
    return folder


def say(*args):
    from medvl.commands import app
    return CliRunner().invoke(app, [str(a) for a in args])


def test_commands(saved, models, tmp_path):
    film = saved/'film.png'
    done = say('report', saved/'writer', film)
    assert done.exit_code == 0 and medvl.load(saved/'writer').report(film).text in done.output and 'learnt nothing' in done.output, done.output
    assert say('report', saved/'writer', film, '--seed', 3).output == say('report', saved/'writer', film, '--seed', 3).output
    done = say('answer', saved/'answerer', film, 'where is it?', 'left', 'right')
    assert done.exit_code == 0 and done.output.splitlines()[1] in ('left', 'right')
    (tmp_path/'r.txt').write_text('No effusion. The heart is enlarged.')
    typed, filed = (say('check', saved/'xvl', film, r) for r in ('No effusion. The heart is enlarged.', tmp_path/'r.txt'))
    assert typed.exit_code == 0 and typed.output == filed.output and 'of 2 sentences doubtful, by cosine' in typed.output, typed.output
    assert 'by match' in say('check', saved/'xvl', film, 'No effusion.', '--score', 'match').output
    page = say('check', saved/'xvl', film, 'No <b>effusion</b>.', '-o', tmp_path/'c.html')
    assert page.exit_code == 0 and '<b>' not in (tmp_path/'c.html').read_text() and '&lt;b&gt;' in (tmp_path/'c.html').read_text()
    for command, more in (('check', ['No effusion.']), ('explain', ['effusion'])):
        wrong = say(command, saved/'xvl', film, *more, '-o', tmp_path/'c.gif')
        assert wrong.exit_code == 2 and 'must end in .png' in wrong.output and not (tmp_path/'c.gif').exists()
    done = say('check', saved/'xvl', film, 'No effusion.', '-o', tmp_path/'c.png')
    assert done.exit_code == 0 and (tmp_path/'c.png').stat().st_size > 500


@pytest.mark.parametrize('args, says', [(('report', 'xvl', 'film.png'), 'The writer can'), (('answer', 'answerer', 'film.png', ' '), 'question is empty'),
    (('check', 'xvl', 'film.png', ' '), 'report is empty'), (('check', 'xvl', 'film.png', 'absent.txt'), 'absent.txt'), (('check', 'xvl', 'gone.png', 'No edema.'), 'gone.png'),
    (('check', 'xvl', 'film.png', 'No edema.', '-c', 'chset'), 'chest'), (('check', 'answerer', 'film.png', 'No edema.'), 'What reads both can')])
def test_commands_refuse_in_one_line(saved, args, says):
    done = say(args[0], saved/args[1], saved/args[2], *args[3:])
    assert done.exit_code == 2 and says in done.output and done.output.startswith('medvl: ') and done.output.count('\n') == 1, done.output


def test_the_page_of_a_run_is_written_as_before(tmp_path):
    done = say('report', tmp_path/'none')
    assert done.exit_code == 2 and 'Unknown run' in done.output and done.output.count('\n') == 1
    assert say('runs', 'report', tmp_path/'none').output == done.output
