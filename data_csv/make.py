"""How the miniature was made: phantom exams, with names that a person can read. `python data_csv/make.py` writes it again."""
import shutil
import tempfile
from pathlib import Path

import pandas as pd

from medvl.data.phantom.breast_dataset import write_phantom

HERE = Path(__file__).parent
EXAMS, SIZE = 21, (112, 72) # four views each; the first patient came twice
KEEP = ['image_path', 'patient_id', 'exam_id', 'image_id', 'laterality', 'view', 'source', 'age', 'density', 'birads', 'pathology', 'report_text', 'mask_path',
        'spacing_y', 'spacing_x', 'label_mass', 'label_suspicious_calcification', 'label_cancer']


def main():
    with tempfile.TemporaryDirectory() as place:
        made = write_phantom(Path(place)/'phantom', EXAMS, SIZE, seed=0, difficulty='easy')
        index, boxes, sentences = (pd.read_csv(Path(made)/f'{k}.csv', dtype=str, keep_default_na=False) for k in ('index', 'boxes', 'sentences'))
        exams = list(dict.fromkeys(index.exam_id))
        who = {e: f'{max(k, 1):04d}' for k, e in enumerate(exams)}
        visit = {e: f'{who[e]}-{2022 if k == 0 else 2024}' for k, e in enumerate(exams)}
        new = {r.image_id: f'{visit[r.exam_id]}_{r.laterality}{r.view}' for r in index.itertuples(index=False)}
        index['age'] = index.age.where(index.exam_id != exams[0], (index.age[index.exam_id == exams[1]].astype(int).iloc[0] - 2).__str__())
        index = index.assign(patient_id=index.exam_id.map(who), exam_id=index.exam_id.map(visit), image_id=index.image_id.map(new), source='example')
        for folder, column in (('images', 'image_path'), ('masks', 'mask_path')):
            shutil.rmtree(HERE/folder, ignore_errors=True)
            (HERE/folder).mkdir()
            for i, path in zip(index.image_id, index[column]):
                if path: shutil.copyfile(Path(made)/path, HERE/folder/f'{i}.png')
            index[column] = [f'{folder}/{i}.png' if p else '' for i, p in zip(index.image_id, index[column])]
        boxes['image_id'], sentences['image_id'], sentences['exam_id'] = boxes.image_id.map(new), sentences.image_id.map(lambda i: new.get(i, '')), sentences.exam_id.map(visit)
        sentences['box'] = sentences.box.replace('', '-1')
        index[KEEP].to_csv(HERE/'index.csv', index=False)
        boxes[['image_id', 'label', 'x0', 'y0', 'x1', 'y1', 'severity']].to_csv(HERE/'boxes.csv', index=False)
        sentences[['exam_id', 'laterality', 'sentence', 'label', 'image_id', 'box']].to_csv(HERE/'sentences.csv', index=False)


if __name__ == '__main__': main()
