"""Tables in the exact form and size of public releases, quirks included, made by seeded code. The numbers stand in the releases' descriptions."""
import numpy as np
import pandas as pd

from medvl.data.schema import Source, sort_out

VINDR = ['study_id', 'series_id', 'image_id', 'laterality', 'view_position', 'height', 'width', 'breast_birads', 'breast_density', 'finding_categories', 'finding_birads',
         'xmin', 'ymin', 'xmax', 'ymax', 'split']
SINGLE = ['Mass', 'Suspicious Calcification', 'Focal Asymmetry', 'Architectural Distortion', 'Skin Thickening', 'Nipple Retraction', 'Suspicious Lymph Node', 'Skin Retraction',
          'Asymmetry', 'Global Asymmetry']


def finding_images(rng, n_two, n_one, mass, calc):
    "Lists of finding lists: images with two rows (of which `mass` and `calc` conflict), and with one."
    both = mass + calc - n_two if mass + calc > n_two else mass//2
    two = [(['Mass'], ['Suspicious Calcification'])]*both + [(['Mass'], ['Asymmetry'])]*(mass - both) + [(['Suspicious Calcification'], ['Focal Asymmetry'])]*(calc - both)
    two += [(['Mass'], ['Mass'])]*(n_two - len(two))
    names = rng.choice(SINGLE, n_one, p=[.45, .3, .06, .05, .04, .03, .03, .02, .01, .01])
    return two + [([str(n), 'Skin Thickening'] if n == 'Nipple Retraction' else [str(n)],) for n in names]


def vindr(seed=0):
    "breast-level_annotations (20000 rows) and finding_annotations (20486 rows: 2254 with a box first, then 18232 No Finding)."
    rng = np.random.default_rng(seed)
    hexa = lambda n: [''.join(r) for r in rng.choice(list('0123456789abcdef'), (n, 32))]
    studies, images = hexa(5000), hexa(20000)
    breast = pd.DataFrame({'study_id': np.repeat(studies, 4), 'series_id': np.repeat(hexa(5000), 4), 'image_id': images, 'laterality': ['L', 'L', 'R', 'R']*5000,
        'view_position': ['CC', 'MLO']*10000, 'height': 3518, 'width': rng.choice([2800, 2812], 20000),
        'breast_birads': [f'BI-RADS {b}' for b in np.repeat(rng.choice([1, 2, 3, 4, 5], 10000, p=[.67, .23, .05, .04, .01]), 2)],
        'breast_density': [f'DENSITY {d}' for d in np.repeat(rng.choice(list('ABCD'), 10000, p=[.01, .1, .76, .13]), 2)], 'split': np.repeat(['training', 'test'], [16000, 4000])})
    rows, clean = [], []
    for start, stop, parts in ((0, 16000, (391, 1020, 157, 126)), (16000, 20000, (95, 262, 38, 30))):
        order = rng.permutation(np.arange(start, stop))
        found = finding_images(rng, *parts)
        for i, lists in zip(order, found):
            for names in lists:
                x, y, w, h = rng.uniform(100, 1500), rng.uniform(100, 2500), rng.uniform(30, 900), rng.uniform(30, 900)
                rows.append((i, str(names), f'BI-RADS {rng.integers(3, 6)}', x, y, x + w, y + h))
        clean += [(i, "['No Finding']", '', np.nan, np.nan, np.nan, np.nan) for i in order[len(found):]]
    number, categories, birads, *edges = zip(*rows, *clean)
    finding = breast.iloc[list(number)].reset_index(drop=True).assign(finding_categories=categories, finding_birads=birads, xmin=edges[0], ymin=edges[1], xmax=edges[2], ymax=edges[3])
    return breast, finding[VINDR]


def rsna(seed=0):
    "train_folds: 54706 rows, 11913 patients, 486 with cancer, 1158 positive images, 38 images of unusual views."
    rng = np.random.default_rng(seed)
    n = 11913
    extra = rng.multinomial(54706 - 4*n, np.full(n, 1/n))
    patients = np.sort(rng.choice(np.arange(2, 65535), n, replace=False))
    site = np.where(np.arange(n) < 5600, 1, 2)
    fold = np.arange(n) % 4
    cancer = rng.choice(n, 486, replace=False)
    side = dict(zip(cancer.tolist(), rng.choice(['L', 'R'], 486)))
    views = [('L', 'CC'), ('L', 'MLO'), ('R', 'MLO'), ('R', 'CC')]
    rows = [(p, *view) for p in range(n) for view in views + [views[int(v)] for v in rng.integers(0, 4, extra[p])]]
    df = pd.DataFrame(rows, columns=['p', 'laterality', 'view'])
    sick = df.p.map(side).eq(df.laterality)
    odd = rng.choice(np.flatnonzero(~sick & df.duplicated()), 38, replace=False)
    df.loc[odd, 'view'] = rng.choice(['AT', 'LM', 'ML', 'LMO'], 38)
    s = site[df.p]
    benign = rng.random(len(df)) < .03
    return pd.DataFrame({'site_id': s, 'patient_id': patients[df.p], 'image_id': rng.choice(2**31, len(df), replace=False), 'laterality': df.laterality, 'view': df['view'],
        'age': np.where(rng.random(len(df)) < .0007, np.nan, np.repeat(rng.integers(26, 90, n), 4 + extra)), 'cancer': sick.astype(int), 'biopsy': (sick | benign).astype(int),
        'invasive': (sick & (rng.random(len(df)) < .7)).astype(int), 'BIRADS': np.where(s == 2, np.nan, np.where(sick, 0, rng.choice([0, 1, 2], len(df)))),
        'implant': (rng.random(len(df)) < .03).astype(int), 'density': np.where(s == 2, None, rng.choice(list('ABCD'), len(df))), 'machine_id': rng.choice([21, 29, 48, 49], len(df)),
        'difficult_negative_case': ~sick & (rng.random(len(df)) < .14), 'fold': fold[df.p]})


def usable(source, root=None):
    "Every table passes the schema, boxes belong to images, and with a root every file is there."
    assert isinstance(source, Source)
    for kind in ('records', 'boxes'):
        table = getattr(source, kind)
        if len(table):
            _, problems = sort_out(table, kind)
            assert not len(problems), problems.head()
    assert source.boxes.image_id.isin(source.records.image_id).all() and source.records.image_id.is_unique
    if root is not None:
        for column in ('image_path', 'mask_path'):
            assert all((root/p).is_file() for p in source.records.get(column, pd.Series(dtype=object)) if p)
    return source
