import pandas as pd, glob
from medvl.data.prepared import open_prepared
from medvl.evaluate.metrics.coco import coco_map
import inspect
d=open_prepared(glob.glob('/work/measure_out/o5/mammo_clip*/steps/prepare/prepared')[0])
m=d.manifest; m=m[m.split=='test']
f=pd.read_csv(glob.glob('/work/measure_out/o5/detection*/tables/detections.csv')[0])
t=d.boxes[d.boxes.image_id.isin(m.image_id)&(d.boxes.label=='mass')]
print(len(m),len(t),len(f), f.groupby('image_id').score.apply(lambda s:s.duplicated().sum()).sum(), f.score.duplicated().sum())
for ties in ('together','listed'): print(ties, coco_map(t,f,m[['image_id','patient_id']],['mass'],ties=ties))
