"""CheXlocalize's files and protocol: its public sample pixel by pixel, its rules by a plain loop with its own tools, and answers that are missing."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from golden import sample

from medvl.attribute.chexlocalize import behind_human, chexlocalize_table, heat_segmentation, hit_scores, overlap_scores, published_interval
from medvl.core.errors import DataError
from medvl.data.pixels.coco_rle import coco_rle_mask, mask_coco_rle
from medvl.data.releases.chexlocalize import CHEXLOCALIZE_FINDINGS, annotation_mask, read_heat_maps, read_finding_outlines, read_points, read_segmentations, write_heat_map, write_segmentations


def public(name): return sample(f'grounding/chexlocalize_sample/{name}')


@pytest.mark.parametrize('name', ['gt_segmentations_val.json', 'gradcam_segmentations_val_sample.json'])
def test_run_lengths_are_those_of_pycocotools(name):
    coco = pytest.importorskip('pycocotools.mask')
    for own in read_segmentations(public(name)).values():
        assert set(own) == set(CHEXLOCALIZE_FINDINGS)
        for item in own.values():
            mask = coco_rle_mask(item)
            assert (mask == coco.decode(item)).all() and mask_coco_rle(mask) == item


def test_run_lengths_of_drawn_masks():
    coco = pytest.importorskip('pycocotools.mask')
    rng = np.random.default_rng(0)
    for _ in range(100):
        mask = rng.random(rng.integers(1, 40, 2)) < rng.random()
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert mask_coco_rle(mask)['counts'] == theirs['counts'].decode() and (coco_rle_mask(theirs) == mask).all() # bytes, too


def test_outlines_of_the_sample_become_its_segmentations_exactly():
    truth, drawn = read_segmentations(public('gt_segmentations_val.json')), 0
    for image, (size, own) in read_finding_outlines(public('gt_annotations_val.json')).items():
        for finding, polygons in own.items():
            assert (annotation_mask(polygons, size) == coco_rle_mask(truth[image][finding])).all()
            drawn += 1
    assert drawn == 4


def theirs(truth, found, true_positives):
    "The published evaluation as a plain loop: pycocotools, pandas, NumPy's old generator."
    coco = pytest.importorskip('pycocotools.mask')
    table = {}
    for finding in sorted(CHEXLOCALIZE_FINDINGS):
        table[finding] = []
        for image in sorted(truth):
            there = coco.decode(truth[image][finding])
            shown = coco.decode(found[image][finding]) if image in found else np.zeros_like(there)
            empty = there.sum() == 0 or (true_positives and shown.sum() == 0)
            table[finding].append(np.nan if empty else np.logical_and(there, shown).sum() / np.logical_or(there, shown).sum())
    frame, draws = pd.DataFrame(table), []
    np.random.seed(0)
    for _ in range(1000): draws.append(frame.iloc[np.random.choice(len(frame), size=len(frame), replace=True)].mean())
    draws = pd.DataFrame(draws)
    return frame, {f: (draws[f].sort_values().iloc[24], draws[f].sort_values().iloc[974]) for f in draws}


@pytest.mark.parametrize('true_positives', [True, False])
def test_the_published_evaluation_of_the_public_sample(true_positives):
    truth, found = json.loads(public('gt_segmentations_val.json').read_text()), json.loads(public('gradcam_segmentations_val_sample.json').read_text())
    frame, intervals = theirs(truth, found, true_positives)
    ours = overlap_scores(read_segmentations(public('gt_segmentations_val.json')), read_segmentations(public('gradcam_segmentations_val_sample.json')), true_positives)
    wide = ours.pivot(index='image_id', columns='finding', values='iou')
    np.testing.assert_array_equal(wide[sorted(wide)].to_numpy(float), frame[sorted(frame)].to_numpy(float))
    table = chexlocalize_table(ours, 100).set_index('finding')
    for finding in frame.mean().dropna().index:
        assert table.value[finding] == pytest.approx(frame[finding].mean(), abs=1e-12)
        np.testing.assert_allclose([table.published_low[finding], table.published_high[finding]], intervals[finding], atol=1e-12)
    assert not ours.missing.any() and wide.notna().sum().sum() == 4


def test_the_published_interval_with_many_images_and_holes():
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(np.where(rng.random((40, 3)) < .3, np.nan, rng.random((40, 3))), columns=['a', 'b', 'c'])
    np.random.seed(0)
    draws = pd.DataFrame([frame.iloc[np.random.choice(40, size=40, replace=True)].mean() for _ in range(1000)])
    ours = published_interval(frame)
    for c in frame: np.testing.assert_allclose(ours.loc[c, ['low', 'high', 'mean']].astype(float), [draws[c].sort_values().iloc[24], draws[c].sort_values().iloc[974], draws[c].mean()], atol=1e-12)


def square(at): return np.pad(np.ones((4, 4), bool), ((at, 16 - at), (at, 16 - at)))


def test_a_missing_answer_is_no_other_images_answer():
    truth = {f'patient{k}_study1_view1_frontal': {'Edema': square(k), 'Atelectasis': square(k)} for k in (1, 2, 3)}
    first = next(iter(truth))
    found = {first: truth[first]} # only the first image was answered; all truths overlap it
    scores = overlap_scores(truth, found, true_positives=False).set_index(['image_id', 'finding'])
    assert scores.iou.tolist() == [1, 1, 0, 0, 0, 0] and scores.missing.tolist() == [False, False, True, True, True, True] and scores.found_pixels.iloc[2:].sum() == 0
    assert overlap_scores(truth, found).iou.notna().sum() == 2 # by the published default they do not count at all
    half = {i: {'Edema': m['Edema']} for i, m in truth.items()} # one finding of each image is missing
    assert overlap_scores(truth, half, False).set_index('finding').missing.to_dict() == {'Edema': False, 'Atelectasis': True}
    hits = hit_scores(truth, {first: {'Edema': square(1).astype(float)}})
    assert hits.hit.sum() == 1 and hits.missing.sum() == 5 and hits.hit.notna().all()
    table = chexlocalize_table(overlap_scores(truth, found, False), 50).set_index('finding')
    assert table.missing['all'] == 4 and table.value['Edema'] == pytest.approx(1 / 3)


def test_regions_of_odd_maps():
    flat = heat_segmentation(torch.ones(3, 3), (9, 9))
    assert not flat.any() and flat.dtype == bool and not heat_segmentation(torch.zeros(3, 3), (9, 9), .5).any()
    assert heat_segmentation(-torch.eye(3), (9, 9), .5).any() # negative values: a range is a range
    for bad in (torch.full((3, 3), torch.nan), torch.zeros(1, 3, 3)):
        with pytest.raises(ValueError, match='finite and'): heat_segmentation(bad, (9, 9))
    with pytest.raises(ValueError, match='not finite'): hit_scores({'a': {'Edema': square(0)}}, {'a': {'Edema': np.full((3, 3), np.nan)}})
    truth = {'a': {'Edema': square(0) & False}}
    scores = overlap_scores(truth, {'a': {'Edema': square(0)}}, False)
    assert scores.iou.isna().all() and hit_scores(truth, {'a': {'Edema': square(0) * 1.}}).hit.isna().all() # an empty truth is not defined
    with pytest.raises(DataError, match='true_positives=False'): chexlocalize_table(scores)
    with pytest.raises(DataError, match='Stretch the map'): overlap_scores({'a': {'Edema': square(0)}}, {'a': {'Edema': square(0)[1:]}})


def test_behind_a_reader():
    truth = {f'patient{k}_study1_view1_frontal': {'Edema': square(4)} for k in range(12)}
    half = {i: {'Edema': square(4) & (np.arange(20) < 6)} for i in truth}
    gap = behind_human(overlap_scores(truth, half), overlap_scores(truth, truth), 100).set_index('finding')
    assert gap.behind['Edema'] == pytest.approx(50) and gap.low['Edema'] == pytest.approx(50) and gap.n['all'] == 12
    assert behind_human(overlap_scores(truth, truth), overlap_scores(truth, half), 50).behind.iloc[0] == pytest.approx(-100)


def test_files_that_are_wrong(tmp_path):
    write_segmentations({'a': {'Edema': square(2)}}, tmp_path/'a.json')
    assert (coco_rle_mask(read_segmentations(tmp_path/'a.json')['a']['Edema']) == square(2)).all()
    (tmp_path/'cut.json').write_text((tmp_path/'a.json').read_text()[:30])
    with pytest.raises(DataError, match='Download it again'): read_segmentations(tmp_path/'cut.json')
    with pytest.raises(DataError, match='does not exist'): read_segmentations(tmp_path/'none.json')
    (tmp_path/'list.json').write_text('[1]')
    with pytest.raises(DataError, match='no table of images'): read_segmentations(tmp_path/'list.json')
    (tmp_path/'line.json').write_text('{"a": {"Edema": [[[1, 2], [3, 4], [5, 0]]]}}')
    with pytest.raises(DataError, match='no img_size'): read_finding_outlines(tmp_path/'line.json')
    for counts in ('', 'a', '~~', None, [3, -1, 2], [1, 2]):
        with pytest.raises(DataError): coco_rle_mask({'size': [2, 2], 'counts': counts})
    write_heat_map(tmp_path/'maps', 'p_1', 'Edema', np.eye(3), (9, 9))
    assert list(read_heat_maps(tmp_path/'maps')) == [('p_1', 'Edema')]
    (tmp_path/'maps'/'p_2_Edema_map.npz').write_bytes(b'no archive')
    with pytest.raises(DataError, match='no heat map'): read_heat_maps(tmp_path/'maps')
    (tmp_path/'empty').mkdir()
    with pytest.raises(DataError, match='there is no heat map in it'): read_heat_maps(tmp_path/'empty')


def test_points_of_a_reader_as_the_published_program_counts_them(tmp_path):
    """Its loop over made points: any point inside is a hit, a finding that was not pointed at is none, no truth is no score."""
    rng, truth, points = np.random.default_rng(0), {}, {}
    for k in range(8):
        image = f'patient{k}_study1_view1_frontal'
        truth[image] = {f: np.zeros((20, 24), bool) for f in ('Edema', 'Lung Lesion')}
        if k % 4: truth[image]['Edema'][3:15, 2 + k:12 + k] = True
        truth[image]['Lung Lesion'][k:k + 5, 4:9] = True
        if k != 5: points[image] = {'Edema': (rng.random((2 * (k % 3), 2)) * [24, 20]).round(3).tolist(), 'Lung Lesion': (rng.random((9, 2)) * [24, 20]).tolist()}
    (tmp_path/'hb_salient_pts.json').write_text(json.dumps(points))
    read, theirs = read_points(tmp_path/'hb_salient_pts.json'), {}
    for image in truth:
        for finding, mask in truth[image].items():
            hit = np.nan
            if mask.any(): hit = 0.
            if mask.any() and finding in points.get(image, {}):
                for x, y in points[image][finding]: hit = max(hit, float(mask[int(y), int(x)]))
            theirs[image, finding] = hit
    ours = hit_scores(truth, read).set_index(['image_id', 'finding'])
    assert read == points and all(np.array_equal([ours.hit[k]], [v], equal_nan=True) for k, v in theirs.items()) and 0 < ours.hit.mean() < 1
    assert ours.missing.sum() == 2 and ours.hit[('patient5_study1_view1_frontal', 'Edema')] == 0
    for text, says in (('{"a": {"Edema": [[1]]}}', 'no list of'), ('{"a": {"Edema": {"size": [2, 2], "counts": "4"}}}', 'read_segmentations'), ('{"a": {"Bone": []}}', 'finding'), ('{"a": {"Edema": [[-1, 2]]}}', 'lies on no image'), ('[', 'Download it again')):
        (tmp_path/'bad.json').write_text(text)
        with pytest.raises(DataError, match=says): read_points(tmp_path/'bad.json')


@pytest.fixture(scope='module')
def release(tmp_path_factory):
    """A made release of CheXlocalize with a reader who draws half of every region and points at one corner; prepared, and a network of two of its findings."""
    import cv2
    from medvl.api import Model
    from medvl.data.phantom.chest_film import chest_exam
    from medvl.data.prepare.run import prepare
    from medvl.data.releases.chexlocalize import read_chexlocalize
    from medvl.methods.supervised import Supervised, SupervisedConfig
    root, truth, half, points = tmp_path_factory.mktemp('chex'), {}, {}, {}
    for k in range(6):
        image, folder = f'patient{k}_study1_view1_frontal', root/'release'/'CheXpert-v1.0'/'valid'/f'patient{k}'/'study1'
        folder.mkdir(parents=True)
        cv2.imwrite(str(folder/'view1_frontal.jpg'), chest_exam(0, k, size=(96, 96), difficulty='easy').pixels)
        heart, lung = np.zeros((96, 96), bool), np.zeros((96, 96), bool)
        heart[50:80, 30 + 2*k:66], lung[20:60, 4:24] = True, k % 2 == 0
        truth[image] = {'Cardiomegaly': heart, 'Edema': lung}
        half[image] = {f: m & (np.arange(96)[:, None] < (64 if f == 'Cardiomegaly' else 40)) for f, m in truth[image].items()}
        points[image] = {'Cardiomegaly': [[40.5, 60.2]], 'Edema': [[90, 90]]}
    write_segmentations(truth, root/'release'/'gt_segmentations_val.json'); write_segmentations(half, root/'hb.json')
    (root/'hb_salient_pts.json').write_text(json.dumps(points)); (root/'salt').write_text('for tests only')
    data = prepare(read_chexlocalize(root/'release', root/'derived'), root/'derived', root/'prepared', profile='resize_v1', size=(48, 48), jobs=1, backend='sequential', salt=root/'salt')
    torch.manual_seed(0)
    net = Supervised(SupervisedConfig(image_encoder='resnet-tiny', labels=('cardiomegaly', 'edema'))).eval()
    return root, data, Model(net, 'resize_v1', (48, 48)).save_pretrained(root/'model')


def test_the_bench_has_a_column_for_a_reader(release):
    from medvl.attribute.bench import bench_scores, bench_table
    from medvl.attribute.bench_tables import believed_lines, strata_table, way_differences
    from medvl.data.releases.chexlocalize import reader_masks
    root, data, model = release
    from medvl.api import load
    findings = {f: ((f,), f) for f in ('cardiomegaly', 'edema')}
    scores, lost = bench_scores(load(model).method, data, findings, {'gradcam': ('gradcam', -1, {})}, images=4, human=reader_masks(root/'hb.json', data))
    human = scores[scores.method == 'human']
    assert not lost and len(human) == 7 and (human.pointing == 1).all() and human.iou_half.between(.4, .62).all() and (human.energy == 1).all() # half of each region, nothing outside
    table = bench_table(scores, ['iou_half'], n_boot=20).set_index(['finding', 'method'])
    assert table.kind['all', 'human'] == 'human' and table.value['all', 'human'] > table.value['all', 'gradcam']
    assert 'human' in set(way_differences(scores, 'gradcam', ['auroc'], 20).method) and 'human' in set(strata_table(scores, n_boot=20).method)
    lines = believed_lines(scores.assign(system='x', model=0), n_boot=20).set_index('method')
    assert lines.kind['human'] == 'human' and not lines.founded['human'] and lines.minus_control['human'] == lines.minus_control['human'] # shown, never "founded"


def test_pages_with_a_reader(release, tmp_path):
    from medvl.run.runner import find_experiment, run_experiment
    root, data, model = release
    shared = dict(model=str(model), data=str(root/'prepared'), split='all', human=str(root/'hb.json'), n_boot=20)
    run = run_experiment(find_experiment('grounding'), shared | dict(protocol='chexlocalize', truth_file=str(root/'release'/'gt_segmentations_val.json'), human_points=str(root/'hb_salient_pts.json')), outputs=tmp_path)
    chex = pd.read_csv(run.folder/'tables'/'chexlocalize.csv')
    human = chex[chex.map_of == 'human'].set_index(['finding', 'metric']).value
    assert human['Cardiomegaly', 'hit'] == 1 and human['Edema', 'hit'] == 0 and human['all', 'iou'] == pytest.approx(.5, abs=.02)
    behind = pd.read_csv(run.folder/'tables'/'behind_human.csv').set_index('finding')
    assert behind.human['all'] == pytest.approx(human['all', 'iou']) and behind.behind['all'] > 0 and set(pd.read_csv(run.folder/'tables'/'behind_points.csv').finding) == {'Cardiomegaly', 'Edema', 'all'}
    run = run_experiment(find_experiment('attribution_bench'), shared | dict(knows=0, ways=['gradcam'], images=2, absent=0, tune=0, faithful=0), outputs=tmp_path)
    assert (pd.read_csv(run.folder/'tables'/'bench.csv').method == 'human').any()
