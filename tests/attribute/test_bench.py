"""The bench of heat maps: a planted map on the finding is founded, a blind one is not, and what cannot be asked is said."""
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.sparse.linalg import spsolve

from medvl.attribute import bench
from medvl.attribute.attribute import EXPLANATIONS
from medvl.attribute.bench import CONTROLS, beside_controls, bench_scores, bench_table, control_map
from medvl.attribute.faithfulness import change_curves, imputed
from medvl.attribute.gradcam import grad_cams
from medvl.attribute.masking import occlusion, rise, rise_masks, score_cam
from medvl.attribute.targets import Explanation, Target, score_of
from medvl.core.errors import DataError
from medvl.data.phantom.breast_prepared import prepared_phantom
from medvl.methods.recipes import new_method


@pytest.fixture(scope='module')
def data(tmp_path_factory): return prepared_phantom(tmp_path_factory.mktemp('bench'), 10, (96, 64))


@pytest.fixture(scope='module')
def model(data): return new_method('mammoclip', 'smoke', data.manifest.report).eval()


def planted(monkeypatch, data, labels=('mass',)):
    "Ways of which one knows the truth of the image it is shown, and one gives the same map for all."
    truths = {np.array(data.image(i)).tobytes(): bench.truth_mask(data, i, labels).astype(np.float32) for i in range(len(data))}
    knows = lambda method, images, target, level: (torch.from_numpy(truths[images[0, 0].to(torch.uint8).numpy().tobytes()]), {})
    blind = lambda method, images, target, level: (torch.linspace(0, 1, images[0, 0].numel()).view(images.shape[-2:]), {})
    for name, draw in (('knows', knows), ('blind', blind)): monkeypatch.setitem(EXPLANATIONS, name, Explanation(draw, ('sentence',), 'planted'))
    return {'knows': ('knows', -1, {}), 'blind': ('blind', -1, {}), 'attention': ('rollout', -1, {})}


def test_a_map_that_knows_is_founded_and_a_blind_one_is_not(data, model, monkeypatch):
    scores, lost = bench_scores(model, data, {'mass': (('mass',), 'there is a mass')}, planted(monkeypatch, data))
    assert list(lost) == ['attention'] and 'on a ViT' in lost['attention']
    assert set(scores.method) == {*CONTROLS, 'knows', 'blind', "knows, another's image", "blind, another's image"}
    beside = beside_controls(scores, n_boot=200).set_index(['method', 'control'])
    best = beside.loc['knows'].index[0]
    assert best in CONTROLS and beside.loc['knows', best].founded and not beside.loc['blind', best].founded
    assert beside.loc['knows', "knows, another's image"].difference > .2 # another patient's finding lies elsewhere
    assert beside.loc['blind', "blind, another's image"].difference == 0 # the same map whatever it is shown
    table = bench_table(scores, n_boot=50)
    of = lambda m, k: table[(table.finding == 'all') & (table.method == m) & (table.metric == k)].value.item()
    assert of('knows', 'auroc') == 1 and of('knows', 'energy') == 1 and of('uniform', 'auroc') == .5
    assert of('uniform', 'pointing') == pytest.approx(scores.drop_duplicates('image_id').chance.mean())


def test_curves_of_the_first_images_only(data, model, monkeypatch):
    ways = {'knows': planted(monkeypatch, data)['knows']}
    scores, _ = bench_scores(model, data, {'mass': (('mass',), 'there is a mass')}, ways, images=3, faithful=1, steps=4)
    assert scores.deletion.notna().sum() == 1 + len(CONTROLS) and scores.image_id.nunique() == 3
    assert (scores.insertion - scores.deletion - scores['insertion - deletion']).abs().max() < 1e-9


def test_what_cannot_be_benched(data, model):
    with pytest.raises(DataError, match='no image has a box of bone'): bench_scores(model, data, {'bone': (('bone',), 'bone')}, {})
    with pytest.raises(ValueError, match='control'): control_map('middle', np.zeros((4, 4)))
    one = pd.DataFrame([dict(finding='a', image_id=1, patient_id=1, method='m', kind='way', auroc=.5)])
    with pytest.raises(ValueError, match='measure'): beside_controls(one, 'beauty')


def test_controls_know_no_model():
    image = np.zeros((40, 30), np.uint8); image[10:20, 5:15] = 200
    maps = {k: control_map(k, image, np.random.default_rng(0)) for k in CONTROLS}
    assert all(m.shape == image.shape and np.isfinite(m).all() for m in maps.values())
    assert np.unravel_index(maps['centre'].argmax(), image.shape) in [(19, 14), (20, 15), (19, 15), (20, 14)]
    assert maps['brightness'][15, 10] == pytest.approx(maps['brightness'].max(), rel=.05) and maps['edges'][15, 10] < maps['edges'].max() / 2


def test_empty_truths_tuned_thresholds_and_a_reader(data, model, monkeypatch):
    ways, found = {'knows': planted(monkeypatch, data)['knows']}, {'mass': (('mass',), 'there is a mass')}
    rules = bench.tuned_rules(model, data, found, ways, 3)
    assert set(rules) == {('mass', k) for k in (*CONTROLS, 'knows')}
    reader = lambda i, finding: bench.truth_mask(data, i, ['mass']) if i % 2 else None
    scores, _ = bench_scores(model, data, found, ways, images=4, faithful=1, steps=3, absent=3, baselines=('zero', 'mean'), tuned=rules, human=reader, fewer={'knows': 2})
    here, gone = scores[scores.present], scores[~scores.present]
    assert gone.image_id.nunique() == 3 and gone[['pointing', 'energy', 'auroc', 'box_iou']].isna().all(axis=None) and (gone.area == 0).all()
    own = here[here.method == 'knows']
    assert len(own) == 2 and (own.iou_tuned == 1).all() and (own.number >= 1).all() and (own.iou_half == 1).all()
    human = here[here.method == 'human']
    assert set(human.kind) == {'human'} and (human.iou_half == 1).all() and len(human) <= 4
    noisy, _ = bench_scores(model, data, found, {'gradcam': ('gradcam', -1, {})}, images=1, faithful=1, steps=2, noisy=2)
    noisy = noisy.set_index('method')
    assert noisy.sensitivity['uniform'] == 0 and noisy.sensitivity['gradcam'] > 0 and noisy.infidelity.dropna().between(0, 1).all() and noisy.infidelity.notna().sum() == 1 + len(CONTROLS)
    assert 'insertion - deletion (mean)' in set(bench_table(scores, n_boot=20).metric) and bench_table(scores, n_boot=20).n.max() == 4 # images without the finding are in no mean
    with pytest.raises(ValueError, match='bring both to one size'): bench_scores(model, data, found, {}, images=1, human=lambda i, f: np.ones((2, 2), bool))


def test_silence_and_models():
    rng, rows = np.random.default_rng(0), []
    for i in range(40):
        for m in ('a', 'b'):
            rows.append(dict(finding='x', image_id=str(i), patient_id=str(i), model=m, method='way', kind='way', present=i % 2 == 0, area=.1, number=1, strength=rng.random() + (i % 2 == 0), auroc=(.8 if m == 'a' else .6) if i % 2 == 0 else None))
            rows.append({**rows[-1], 'method': 'uniform', 'kind': 'control', 'strength': 1., 'auroc': .5 if i % 2 == 0 else None})
    scores = pd.DataFrame(rows)
    from medvl.attribute.bench_tables import bench_over_models, silence_table, strata_table, way_differences
    silent = silence_table(scores[scores.model == 'a'], 100).set_index('method')
    assert silent.value['way'] > .9 and silent.value['uniform'] == .5
    over = bench_over_models(scores, reference='uniform', n_boot=500).set_index('method')
    assert over.value['way'] == pytest.approx(.2) and over.low['way'] == pytest.approx(.1) and over.high['way'] == pytest.approx(.3) # models differ, images do not
    assert over.n['way'] == 40 and over.models['way'] == 2
    assert way_differences(scores[scores.model == 'a'], 'uniform', ['auroc'], 50).difference.tolist() == [pytest.approx(.3)]
    with pytest.raises(DataError, match='absent=20'): silence_table(scores[scores.present])
    with pytest.raises(DataError, match='which model'): bench_over_models(scores.drop(columns='model'))
    with pytest.raises(ValueError, match='measure'): strata_table(scores, 'beauty')


def test_truths_that_are_not_there(data):
    has, without = bench.rows_of(data, ['mass'])
    assert has and without and not set(has) & set(without)
    with pytest.raises(ValueError, match='truth'): bench.truth_mask(data, has[0], ['mass'], 'outline')
    bare = data.subset(list(range(len(data)))); bare.masks = None
    with pytest.raises(DataError, match='no mask'): bench.truth_mask(bare, has[0], ['mass'], 'masks')
    assert not bench.truth_mask(bare, without[0], ['mass'], 'masks').any()


def test_odd_maps_in_every_measure():
    from medvl.attribute.map_boxes import box_overlaps, region_shape, tuned_share
    truth, box = np.zeros((8, 8), bool), np.array([[2, 2, 5, 5]]); truth[2:5, 2:5] = True
    for flat in (np.zeros((8, 8)), np.full((8, 8), 3.)):
        row = bench._measured('m', 'x', flat, truth, box, {('x', 'm'): '40%'})
        assert row['auroc'] == .5 and row['iou_tuned'] == row['iou_otsu'] == row['iou_half'] == row['box_iou'] == row['corloc'] == 0 and row['contrast'] == 0
    spot = np.zeros((8, 8)); spot[6, 6] = 1
    nothing = bench._measured('m', 'x', spot, truth & False, box[:0], None)
    assert nothing['pointing'] is nothing['auroc'] is nothing['box_iou'] is nothing['contrast'] is None and nothing['boxes'] >= 1
    for wrong in (np.full((8, 8), np.nan), np.where(np.eye(8), np.inf, 0)):
        with pytest.raises(ValueError, match='finite'): bench._measured('m', 'x', wrong, truth, box, None)
    with pytest.raises(ValueError, match='the same'): bench._measured('m', 'x', np.eye(7), truth, box, None)
    with pytest.raises(ValueError, match='validation image'): tuned_share([np.eye(8)], [truth & False])
    with pytest.raises(ValueError, match='finite'): box_overlaps(np.full((8, 8), np.nan), box)
    assert region_shape(truth & False) == dict(number=0, size=0., elongation=None, irrectangularity=None)


@pytest.mark.parametrize('missing', ['half', 'block', 'all but a corner'])
def test_road_solves_its_system(missing):
    "Against a sparse solver. A fixed number of plain sweeps leaves the inside of a large gap where it began."
    h, w = 24, 30
    rng = np.random.default_rng(0)
    image, y, x = rng.random((h, w)).cumsum(0) / h, *np.mgrid[:h, :w]
    gone = {'half': rng.random((h, w)) < .5, 'block': (abs(y - 12) < 10) & (abs(x - 15) < 12), 'all but a corner': (y > 3) | (x > 3)}[missing]
    at, rows, known = {p: k for k, p in enumerate(zip(*np.nonzero(gone)))}, [], np.zeros(gone.sum())
    for (a, b), k in at.items():
        for da, db in ((da, db) for da in (-1, 0, 1) for db in (-1, 0, 1) if da or db):
            n, share = (a + da, b + db), (1 / 6 if not (da and db) else 1 / 12)
            if not (0 <= n[0] < h and 0 <= n[1] < w): continue
            rows.append((k, k, share))
            if n in at: rows.append((k, at[n], -share))
            else: known[k] += share * image[n]
    i, j, v = zip(*rows)
    exact = image.copy()
    exact[gone] = spsolve(sparse.csr_matrix((v, (i, j))), known)
    ours = imputed(torch.from_numpy(image)[None, None], torch.from_numpy(gone)[None, None], noise=0)[0, 0].numpy()
    assert np.abs(ours - exact).max() < 1e-3 * image.std() and np.array_equal(ours[~gone], image[~gone])


def test_no_more_than_a_chunk_at_once(data, model):
    "Memory is bounded: the network never sees more images at once than `chunk`, and the result is the same."
    image = torch.from_numpy(np.array(data.image(0)))[None].float()
    many = torch.from_numpy(np.stack([np.array(data.image(i)) for i in range(7)]))[:, None]
    seen, score = [], score_of(model, Target('sentence', 'there is a mass'))
    hook = model.image_encoder.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    heats, masks, channels = torch.rand(3, 96, 64), rise_masks((96, 64), 20, seed=1), torch.rand(9, 6, 4)
    ways = {'grad_cams': lambda c: grad_cams(model, many, ['a mass', 'no mass'], chunk=c), 'rise': lambda c: rise(score, image, masks, chunk=c),
            'score_cam': lambda c: score_cam(score, image, channels, chunk=c)[0], 'occlusion': lambda c: occlusion(score, image, window=24, stride=12, chunk=c),
            'curves': lambda c: torch.from_numpy(change_curves(score, image, heats, 'deletion', 'mean', 5, c)[2])}
    try:
        for name, way in ways.items():
            found = {}
            for chunk in (2, 64):
                seen.clear()
                with torch.set_grad_enabled(name == 'grad_cams'): found[chunk] = way(chunk).detach()
                assert max(seen) <= chunk and (chunk == 64 or len(seen) > 2), (name, chunk, seen)
            assert torch.allclose(found[2], found[64], atol=1e-4, rtol=1e-3), name
    finally: hook.remove()


def test_systems_and_seeds_joined_with_those_that_were_not_asked(tmp_path):
    "Three made runs of the bench: two seeds of one system, one of a system that knows nothing; every system has a line, and the picture is drawn."
    import json
    from medvl.core.run import run_info
    from medvl.run.runner import find_experiment, run_experiment
    rng, runs = np.random.default_rng(0), []
    for k, (model, knows) in enumerate((('seen', .9), ('seen', .85), ('blind', .5))):
        rows = []
        for i in range(12):
            base = dict(finding='mass', image_id=f'{k}-{i}', patient_id=f'p{i}', present=True, area=.1, number=1, pointing=1., energy=.5, iou_tuned=.4)
            for m, kind, v in (('gradcam', 'way', .9), ('gradcam, untrained', 'untrained', .5), ("gradcam, another's image", 'stranger', .5), ('centre', 'control', .7), ('random', 'control', .5)):
                rows.append(base | dict(method=m, kind=kind, auroc=v + .02 * rng.random(), **{'insertion - deletion (road)': v}))
        folder = tmp_path/f'run{k}'; (folder/'tables').mkdir(parents=True)
        pd.DataFrame(rows).to_csv(folder/'tables'/'bench_scores.csv', index=False)
        pd.DataFrame([dict(finding='mass', value=knows, low=knows - .05, high=knows + .05, asked=knows >= .8)]).to_csv(folder/'tables'/'known.csv', index=False)
        (folder/'params.json').write_text(json.dumps(dict(model=f'models/{model}{k}', knows=.8))); runs.append(str(folder))
    run = run_experiment(find_experiment('believed_maps'), dict(runs=runs, names=['seen', 'seen', 'blind'], n_boot=50), outputs=tmp_path/'out')
    words = pd.read_csv(run.folder/'tables'/'words.csv').set_index(['system', 'method'])
    assert words.founded['seen', 'gradcam'] == 'yes' and words.models['seen', 'gradcam'] == 2 and words.n['seen', 'gradcam'] == 24
    assert words.founded['blind', 'not asked'] == 'knows none: mass 0.50 (0.45 to 0.55)' and len(words.loc['blind']) == 1
    notes = str(run_info(run.folder))
    assert (run.folder/'figures'/'believed.png').is_file() and 'was not drawn' not in notes
    none = run_experiment(find_experiment('believed_maps'), dict(runs=runs[2:], names=['blind'], n_boot=50), outputs=tmp_path/'out')
    assert pd.read_csv(none.folder/'tables'/'words.csv').method.tolist() == ['not asked']
