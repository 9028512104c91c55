"""Writers of tiny chest X-ray releases in the exact layout of the real ones: folders, file names, headers and quirks of the tables.

Every writer takes a folder and samples (dicts), writes the release there and returns the folder. Pixels are uint8 (h,w). Boxes are x0, y0, x1, y1 in pixels, exclusive ends.

write_rsna_pneumonia(root, samples)            id, pixels, boxes=(), view='PA', normal=None
write_covid_rural(root, samples)               id 'COVID-19-AR-<patient>_<date>-XR', pixels (or (h,w,3)), mask (h,w) 0/1 or None
write_siim(root, samples, stage=1)             id, patient, pixels, masks=() (one row each), view='PA'
write_object_cxr(root, train, dev)             id '00001', pixels, shapes=() of (kind, points)
write_nih_cxr(root, samples, folder='images')  id '00000001_000', pixels, boxes=() of (finding, x0, y0, x1, y1 at 1024 pixels), labels=('No Finding',), age, sex, view, test=False
write_mimic_cxr(root, studies, gzipped=True, zipped=False)   subject, study, images=[(dicom, view, pixels)], report (text or None), split, chexpert={}
write_openi(root, studies, tables=False)       uid, images=[(name, 'Frontal' or 'Lateral', pixels)], findings, impression, indication, comparison, mesh=()
write_chexpert(root, samples)                  part 'train' or 'valid', patient, study, image, pixels, frontal, view, sex, age, labels={}
write_lovt_tables(folder, name, parts)         parts {'train' | 'valid' | 'test': [(id, [(class number, x, y, w, h), …])]}: numbers as LoVT writes them (Object-CXR: x, y, h, w)
"""
import gzip
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

import cv2
import numpy as np

from medvl.data.dicom.write import write_dicom
from medvl.data.releases.lovt_splits import LOVT_SETS
from medvl.data.pixels.shapes import mask_rle


def chest(height=96, width=96, shift=0):
    "Grey pixels that are not constant."
    y, x = np.mgrid[:height, :width]
    return (40 + (2*x + y + 11*shift) % 120).astype(np.uint8)


def _number(v): return f'{v:g}' if float(v).is_integer() else repr(float(v))


def write_rsna_pneumonia(root, samples):
    """stage_2_train_labels.csv, stage_2_detailed_class_info.csv, stage_2_train_images/<id>.dcm."""
    root = Path(root)
    (root/'stage_2_train_images').mkdir(parents=True)
    rows, classes = [], []
    for s in samples:
        write_dicom(root/'stage_2_train_images'/f'{s["id"]}.dcm', s['pixels'], PatientID=s['id'], ViewPosition=s.get('view', 'PA'), Modality='CR', BodyPartExamined='CHEST')
        boxes = s.get('boxes', ())
        name = 'Lung Opacity' if len(boxes) else 'Normal' if s.get('normal', True) else 'No Lung Opacity / Not Normal'
        rows += [f'{s["id"]},{float(x0)},{float(y0)},{float(x1 - x0)},{float(y1 - y0)},1' for x0, y0, x1, y1 in boxes] or [f'{s["id"]},,,,,0']
        classes += [f'{s["id"]},{name}']*max(1, len(boxes))
    (root/'stage_2_train_labels.csv').write_text('\n'.join(['patientId,x,y,width,height,Target', *rows]) + '\n')
    (root/'stage_2_detailed_class_info.csv').write_text('\n'.join(['patientId,class', *classes]) + '\n')
    return root


def write_covid_rural(root, samples):
    """jpgs/<id>.jpg in colour, pngs_masks/<id>.png with 0 and 1."""
    root = Path(root)
    for folder in ('jpgs', 'pngs_masks'): (root/folder).mkdir(parents=True)
    for s in samples:
        pixels = s['pixels'] if s['pixels'].ndim == 3 else np.repeat(s['pixels'][..., None], 3, axis=2)
        cv2.imwrite(str(root/'jpgs'/f'{s["id"]}.jpg'), pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])
        if s.get('mask') is not None: cv2.imwrite(str(root/'pngs_masks'/f'{s["id"]}.png'), np.asarray(s['mask']).astype(np.uint8))
    return root


def write_siim(root, samples, stage=1):
    """train-rle.csv (`ImageId, EncodedPixels`, a space before the second name) or stage_2_train.csv; dicom-images-train/<study>/<series>/<id>.dcm."""
    root, rows = Path(root), []
    for n, s in enumerate(samples):
        folder = root/'dicom-images-train'/f'1.2.276.0.7230010.3.1.2.8323329.{n}'/f'1.2.276.0.7230010.3.1.3.8323329.{n}'
        folder.mkdir(parents=True)
        write_dicom(folder/f'{s["id"]}.dcm', s['pixels'], PatientID=s.get('patient', s['id']), ViewPosition=s.get('view', 'PA'), Modality='CR', BodyPartExamined='CHEST')
        space = ' ' if stage == 1 else ''
        rows += [f'{s["id"]},{space}{m if isinstance(m, str) else mask_rle(m)}' for m in s.get('masks', ())] or [f'{s["id"]},{space}-1']
    name, head = ('train-rle.csv', 'ImageId, EncodedPixels') if stage == 1 else ('stage_2_train.csv', 'ImageId,EncodedPixels')
    (root/name).write_text('\n'.join([head, *rows]) + '\n')
    return root


def write_object_cxr(root, train, dev=()):
    """train.csv, dev.csv (`image_name,annotation`), train/<id>.jpg, dev/<id>.jpg."""
    root = Path(root)
    for part, samples in (('train', train), ('dev', dev)):
        (root/part).mkdir(parents=True)
        rows = ['image_name,annotation']
        for s in samples:
            cv2.imwrite(str(root/part/f'{s["id"]}.jpg'), s['pixels'], [cv2.IMWRITE_JPEG_QUALITY, 95])
            items = [' '.join([str(('box', 'ellipse', 'polygon').index(kind)), *(_number(v) for v in np.ravel(points))]) for kind, points in s.get('shapes', ())]
            rows.append(f'{s["id"]}.jpg,{";".join(items)}')
        (root/f'{part}.csv').write_text('\n'.join(rows) + '\n')
    return root


def write_nih_cxr(root, samples, folder='images'):
    """BBox_List_2017.csv (header with commas in a name), Data_Entry_2017.csv (comma at the end), test_list.txt, train_val_list.txt, <folder>/<id>.png."""
    root = Path(root)
    (root/folder).mkdir(parents=True)
    boxes, entries, lists = ['Image Index,Finding Label,Bbox [x,y,w,h],,,'], ['Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],'], ([], [])
    for s in samples:
        name = f'{s["id"]}.png'
        cv2.imwrite(str(root/folder/name), s['pixels'])
        boxes += [f'{name},{f},{x0},{y0},{x1 - x0},{y1 - y0},,,' for f, x0, y0, x1, y1 in s.get('boxes', ())]
        entries.append(f'{name},{"|".join(s.get("labels", ("No Finding",)))},{int(s["id"][9:])},{int(s["id"][:8])},{s.get("age", 50)},{s.get("sex", "F")},{s.get("view", "PA")},2500,2048,0.168,0.168,')
        lists[s.get('test', False)].append(name)
    for file, lines in (('BBox_List_2017.csv', boxes), ('Data_Entry_2017.csv', entries), ('train_val_list.txt', lists[0]), ('test_list.txt', lists[1])): (root/file).write_text('\n'.join(lines) + '\n')
    return root


CHEXPERT = ('Atelectasis', 'Cardiomegaly', 'Consolidation', 'Edema', 'Enlarged Cardiomediastinum', 'Fracture', 'Lung Lesion', 'Lung Opacity', 'No Finding', 'Pleural Effusion', 'Pleural Other',
            'Pneumonia', 'Pneumothorax', 'Support Devices') # order of MIMIC's tables


def write_mimic_cxr(root, studies, gzipped=True, zipped=False):
    """mimic-cxr-2.0.0-{metadata,split,chexpert,negbio}.csv(.gz), files/p10/p10000032/s50414267/<dicom>.jpg, and the reports: beside the images as files/p10/p10000032/s50414267.txt,
    or in mimic-cxr-reports.zip."""
    root, reports = Path(root), {}
    root.mkdir(parents=True, exist_ok=True)
    meta, split, labels = ['dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime'], ['dicom_id,study_id,subject_id,split'], [','.join(('subject_id', 'study_id', *CHEXPERT))]
    for s in studies:
        folder = f'files/p{str(s["subject"])[:2]}/p{s["subject"]}'
        (root/folder/f's{s["study"]}').mkdir(parents=True)
        for dicom, view, pixels in s['images']:
            cv2.imwrite(str(root/folder/f's{s["study"]}'/f'{dicom}.jpg'), pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])
            meta.append(f'{dicom},{s["subject"]},{s["study"]},CHEST (PA AND LAT),{view},{pixels.shape[0]},{pixels.shape[1]},21800506,213014.531')
            split.append(f'{dicom},{s["study"]},{s["subject"]},{s.get("split", "train")}')
        if s.get('chexpert') is not None: labels.append(','.join([str(s['subject']), str(s['study']), *('' if (v := s['chexpert'].get(c)) is None else f'{float(v)}' for c in CHEXPERT)]))
        if s.get('report') is not None: reports[f'{folder}/s{s["study"]}.txt'] = s['report']
    for name, lines in (('metadata', meta), ('split', split), ('chexpert', labels), ('negbio', labels)):
        text = ('\n'.join(lines) + '\n').encode()
        if gzipped: (root/f'mimic-cxr-2.0.0-{name}.csv.gz').write_bytes(gzip.compress(text))
        else: (root/f'mimic-cxr-2.0.0-{name}.csv').write_bytes(text)
    if zipped:
        with zipfile.ZipFile(root/'mimic-cxr-reports.zip', 'w') as z:
            for path, text in reports.items(): z.writestr(path, text)
    else:
        for path, text in reports.items(): (root/path).write_text(text)
    return root


def write_openi(root, studies, tables=False):
    """ecgen-radiology/<uid>.xml and NLMCXR_png/<name>.png; with `tables` also indiana_reports.csv and indiana_projections.csv of the copy on Kaggle."""
    root = Path(root)
    for folder in ('ecgen-radiology', 'NLMCXR_png'): (root/folder).mkdir(parents=True)
    reports, projections = ['uid,MeSH,Problems,image,indication,comparison,findings,impression'], ['uid,filename,projection']
    quote = lambda t: '"' + t.replace('"', '""') + '"'
    for s in studies:
        part = lambda label, text: f'<AbstractText Label="{label}">{escape(text)}</AbstractText>' if text is not None else ''
        texts = ''.join(part(k.upper(), s.get(k)) for k in ('comparison', 'indication', 'findings', 'impression'))
        images = ''.join(f'<parentImage id="{n}"><figureId>F{i}</figureId><caption>Xray Chest PA and Lateral</caption><panel type="single"><url>/hadoop/storage/{n}.jpg</url></panel></parentImage>' for i, (n, _, _) in enumerate(s['images']))
        mesh = ''.join(f'<major>{escape(m)}</major>' for m in s.get('mesh', ()))
        (root/'ecgen-radiology'/f'{s["uid"]}.xml').write_text(f'<?xml version="1.0" encoding="utf-8"?>\n<eCitation><meta type="rr"/><uId id="CXR{s["uid"]}"/><pmcId id="{s["uid"]}"/>'
            f'<MedlineCitation><Article><Abstract>{texts}</Abstract></Article></MedlineCitation><MeSH>{mesh}</MeSH>{images}</eCitation>')
        for name, side, pixels in s['images']:
            cv2.imwrite(str(root/'NLMCXR_png'/f'{name}.png'), pixels)
            projections.append(f'{s["uid"]},{name[3:]}.dcm.png,{side}')
        reports.append(','.join([str(s['uid']), quote(';'.join(s.get('mesh', ()))), '""', '"Xray Chest PA and Lateral"', *(quote(s.get(k) or '') for k in ('indication', 'comparison', 'findings', 'impression'))]))
    if tables:
        for file, lines in (('indiana_reports.csv', reports), ('indiana_projections.csv', projections)): (root/file).write_text('\n'.join(lines) + '\n')
    return root


CHEXPERT_COLUMNS = ('No Finding', 'Enlarged Cardiomediastinum', 'Cardiomegaly', 'Lung Opacity', 'Lung Lesion', 'Edema', 'Consolidation', 'Pneumonia', 'Atelectasis', 'Pneumothorax', 'Pleural Effusion',
                    'Pleural Other', 'Fracture', 'Support Devices') # order of CheXpert's tables


def write_chexpert(root, samples):
    """train.csv, valid.csv (`Path` begins with the name of the release), train/patient00001/study1/view1_frontal.jpg."""
    root = Path(root)
    lines = {part: [','.join(('Path', 'Sex', 'Age', 'Frontal/Lateral', 'AP/PA', *CHEXPERT_COLUMNS))] for part in ('train', 'valid')}
    for s in samples:
        side = 'Frontal' if s.get('frontal', True) else 'Lateral'
        path = f'{s["part"]}/patient{s["patient"]:05d}/study{s.get("study", 1)}/view{s.get("image", 1)}_{side.lower()}.jpg'
        (root/path).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root/path), s['pixels'], [cv2.IMWRITE_JPEG_QUALITY, 95])
        labels = ['' if (v := s.get('labels', {}).get(c)) is None else f'{float(v)}' for c in CHEXPERT_COLUMNS]
        lines[s['part']].append(','.join([f'CheXpert-v1.0-small/{path}', s.get('sex', 'Female'), str(s.get('age', 60)), side, s.get('view', 'AP') if side == 'Frontal' else '', *labels]))
    for part, rows in lines.items(): (root/f'{part}.csv').write_text('\n'.join(rows) + '\n')
    return root


def write_lovt_tables(folder, name, parts):
    """train.csv, validation.csv, test.csv in the sub-folder of LOVT_SETS[name]; returns `folder`, what `tables=` takes."""
    folder, what = Path(folder), LOVT_SETS[name]
    place = folder/what.folder
    place.mkdir(parents=True, exist_ok=True)
    for part, file in (('train', 'train.csv'), ('valid', 'validation.csv'), ('test', 'test.csv')):
        rows = ['ID,boxes,classes' if what.classes else 'ID']
        for image, boxes in parts[part]:
            cells = ['|'.join(';'.join(map(_number, b[1:])) for b in boxes), '|'.join(str(b[0]) for b in boxes)]
            rows.append(','.join([image, *cells]) if what.classes else image)
        (place/file).write_text('\n'.join(rows) + '\n')
    return folder
