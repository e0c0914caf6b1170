"Mechanics of `data` and `download`: broken input, label lists, geometry under many draws, real photographs."
import json, shutil, subprocess, sys
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torchvision import tv_tensors
from ssl_wikichurches.data.churches import (GEOMETRIES, ChurchDataset, box_mask, boxes_in_view, clip_boxes, eval_transform, open_image,
                                   read_churches, train_transform)
from ssl_wikichurches.data.download import load_churches
from ssl_wikichurches.data.splits import make_split

def edit(folder, name, change):
    d = json.loads((folder/name).read_text()); change(d); (folder/name).write_text(json.dumps(d))

def first_box(d): return next(iter(d['annotations'].values()))['bbox_groups'][0]['elements'][0]

def test_missing_and_truncated_images_are_named_and_counted(folder):
    names = sorted(p.name for p in (folder/'images').iterdir())
    annotated = next(iter(json.loads((folder/'building_parts.json').read_text())['annotations']))
    (folder/'images'/annotated).unlink()
    other = next(n for n in names if n!=annotated)
    data = (folder/'images'/other).read_bytes(); (folder/'images'/other).write_bytes(data[:len(data)//2])
    with pytest.raises(OSError, match='2 of ') as e: read_churches(folder)
    assert annotated in str(e.value) and other in str(e.value)
    left = read_churches(folder, on_error='skip')
    assert set(left.problems.image)=={annotated,other} and not left.boxes.image.isin([annotated]).any()
    make_split(left)

def test_unknown_part_index(folder):
    edit(folder, 'building_parts.json', lambda d: first_box(d).update(label=999))
    with pytest.raises(ValueError, match='part index 999'): read_churches(folder)

@pytest.mark.parametrize('box', [dict(left=1.2), dict(width=0.), dict(top=-.5, height=.4)])
def test_box_without_area_in_the_frame_is_listed(folder, box):
    n = len(read_churches(folder).boxes)
    edit(folder, 'building_parts.json', lambda d: first_box(d).update(box))
    churches = read_churches(folder)
    assert len(churches.boxes)==n-1 and 'no area' in churches.problems.problem.item()

def test_box_that_is_not_a_number(folder):
    edit(folder, 'building_parts.json', lambda d: first_box(d).update(left=float('nan')))
    with pytest.raises(ValueError, match='not finite'): read_churches(folder)

def test_unknown_style(folder):
    edit(folder, 'churches.json', lambda d: next(iter(d.values())).update(styles=['Q1']))
    edit(folder, 'building_parts.json', lambda d: [a.update(styles=[]) for a in d['annotations'].values()])
    with pytest.raises(ValueError, match='style_names.txt'): read_churches(folder)

@pytest.mark.parametrize('name', ['../Q1_wd0.jpg', 'a/Q1_wd0.jpg', '..', '/etc/Q1_wd0.jpg', 'a\\Q1_wd0.jpg'])
def test_image_name_with_a_path(folder, name):
    edit(folder, 'building_parts.json', lambda d: d['annotations'].update({name:dict(styles=[], bbox_groups=[])}))
    with pytest.raises(ValueError, match='path'): read_churches(folder)

def test_church_without_entry(folder):
    shutil.copy(next((folder/'images').iterdir()), folder/'images/Q5_wd0.jpg')
    with pytest.raises(ValueError, match='churches.json'): read_churches(folder)

@pytest.mark.parametrize('name', ['churches.json', 'building_parts.json', 'style_names.txt'])
def test_missing_file(folder, name):
    (folder/name).unlink()
    with pytest.raises(FileNotFoundError, match=name): read_churches(folder)

def test_half_downloaded_json(folder):
    text = (folder/'churches.json').read_text(); (folder/'churches.json').write_text(text[:len(text)//2])
    with pytest.raises(ValueError, match='download complete'): read_churches(folder)

def test_exif_rotation_comes_first(tmp_path):
    im = Image.new('RGB', (40,20)); im.paste((255,255,255), (0,0,10,20))
    exif = Image.Exif(); exif[0x0112] = 6 # turn by 90 degrees clockwise to see it upright
    im.save(tmp_path/'r.jpg', exif=exif, quality=95)
    up = np.asarray(open_image(tmp_path/'r.jpg').convert('L'))
    assert up.shape==(40,20) and up[:8].mean()>200 and up[14:].mean()<50

@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'I;16'])
def test_every_mode_becomes_rgb(tmp_path, mode):
    Image.new(mode, (8,8)).save(tmp_path/'m.png')
    assert open_image(tmp_path/'m.png').mode=='RGB'

coordinate = st.floats(-.5, 1.5, allow_nan=False)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(coordinate, coordinate, st.floats(0, 1.5), st.floats(0, 1.5)), min_size=1, max_size=5))
def test_clipping_is_intersection(rows):
    b = pd.DataFrame(rows, columns=['left','top','width','height']); c = clip_boxes(b)
    for a,e in (('left','width'),('top','height')):
        lo,hi = np.maximum(b[a],0).clip(upper=1), np.minimum(b[a]+b[e],1).clip(lower=0)
        assert np.allclose(c[a], lo) and np.allclose(c[e], np.maximum(hi-lo, 0)) and (c[a]+c[e]<=1+1e-9).all()

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-3, 19)]*4), max_size=4))
def test_mask_is_the_union_of_pixel_centers(rows):
    m = box_mask(torch.tensor(rows, dtype=torch.float32).reshape(-1,4), 16)
    for i in range(16):
        for j in range(16):
            x,y = np.float32(j+.5), np.float32(i+.5)
            assert bool(m[i,j])==any(np.float32(a)<=x<np.float32(c) and np.float32(b)<=y<np.float32(d) for a,b,c,d in rows)

def painted_iou(transform, w, h, box):
    x0,y0,x1,y1 = box
    image = torch.zeros(3,h,w); image[:,y0:y1,x0:x1] = 1
    image,b = transform(tv_tensors.Image(image), tv_tensors.BoundingBoxes(torch.tensor([[x0,y0,x1,y1]], dtype=torch.float32), format='XYXY', canvas_size=(h,w)))
    seen = image.as_subclass(torch.Tensor).mean(0)
    seen = seen>(seen.max()+seen.min())/2 # brightness and contrast may have moved both
    mask = box_mask(b, image.shape[-1])
    return ((seen&mask).sum()/(seen|mask).sum()).item()

SHAPES = [(320,240,(96,60,224,168)), (240,320,(40,100,160,260)), (500,500,(125,125,400,350))]

@pytest.mark.parametrize('geometry', ['squash','crop'])
@pytest.mark.parametrize('w,h,box', SHAPES)
def test_paint_lies_under_its_box_in_evaluation(geometry, w, h, box): assert painted_iou(eval_transform(224, geometry), w, h, box)>=.95

@pytest.mark.parametrize('w,h', [(40,20), (20,40), (41,20)])
def test_a_letterbox_has_as_much_gray_on_either_side(w, h):
    image = tv_tensors.Image(torch.ones(3, h, w))
    out = eval_transform(20, 'letterbox')(image, tv_tensors.BoundingBoxes(torch.zeros(0, 4), format='XYXY', canvas_size=(h,w)))[0]
    rows = (out==.5).all(0).all(1) if w>h else (out==.5).all(0).all(0)
    assert rows.tolist()==[True]*5+[False]*10+[True]*5


@pytest.mark.parametrize('w,h,box', SHAPES)
def test_paint_lies_under_its_box_in_a_letterbox(w, h, box):
    x0,y0,x1,y1 = box
    image = torch.zeros(3,h,w); image[:,y0:y1,x0:x1] = 1
    image,b = eval_transform(224, 'letterbox')(tv_tensors.Image(image), tv_tensors.BoundingBoxes(torch.tensor([box], dtype=torch.float32), format='XYXY', canvas_size=(h,w)))
    seen,mask = image.as_subclass(torch.Tensor).mean(0)>.55, box_mask(b, 224)
    assert ((seen&mask).sum()/(seen|mask).sum()).item()>=.95

@pytest.mark.parametrize('geometry', ['squash','crop'])
def test_paint_lies_under_its_box_in_fifty_draws_of_the_augmentation(geometry):
    torch.manual_seed(0)
    for i in range(50):
        w,h,box = SHAPES[i%3]
        assert painted_iou(train_transform(224, geometry), w, h, box)>=.95

@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_dataset_keeps_parts_beside_boxes(geometry, drawn):
    churches = read_churches(drawn)
    ds = ChurchDataset(churches, churches.boxes.image.unique(), train_transform(48, geometry))
    torch.manual_seed(0)
    for item in ds:
        assert len(item['parts'])==len(item['boxes']) and item['image'].shape==(3,48,48) and 0<=item['image'].min() and item['image'].max()<=1
        assert set(item['parts'])<=set(churches.boxes.part[churches.boxes.image==item['name']])
        assert (item['boxes']>=0).all() and (item['boxes']<=48).all() and (item['boxes'][:,2:]>item['boxes'][:,:2]).all()

def test_boxes_in_view_agrees_with_the_dataset(drawn):
    churches = read_churches(drawn)
    for g in GEOMETRIES:
        items = list(ChurchDataset(churches, churches.boxes.image.unique(), eval_transform(64, g)))
        assert boxes_in_view(churches, 64, g)==dict(boxes=len(churches.boxes), in_view=sum(len(i['boxes']) for i in items), images=len(items), images_in_view=sum(len(i['boxes'])>0 for i in items))

def test_load_churches_refuses_other_words():
    with pytest.raises(FileNotFoundError, match='5166987'): load_churches('wikichurchez')

def test_real_photographs(real):
    churches = load_churches(real/'photos')
    assert len(churches.images)==1105 and churches.images.annotated.sum()==60 and len(churches.boxes)==356 and not len(churches.problems)
    split = make_split(churches)
    assert len(split.eval)==60 and len(split.train)+len(split.val)<=1045
    assert boxes_in_view(churches)['in_view']==356
    big = open_image(next((real/'large').rglob('*.[jp][pn]*g')))
    assert big.mode=='RGB' and min(big.size)>300

# ---- nothing is imported before it is needed

LIGHT = ('files','codec','churches','parts','scene','synthetic','archive','download','splits','prepare','census')

def test_tables_and_splits_need_no_torch(drawn):
    "In a fresh interpreter: neither the import nor reading a folder loads a library for pixels or statistics."
    code = f"""import sys
import {', '.join(f'ssl_wikichurches.data.{m}' for m in LIGHT)}
from ssl_wikichurches.data.churches import read_churches, train_transform
from ssl_wikichurches.data.splits import evaluation_split
churches = read_churches({str(drawn)!r}); evaluation_split(churches); train_transform(64)
print(*sorted({{'torch','torchvision','scipy','sklearn','httpx','imagehash','networkx','timm','transformers'}}&{{*sys.modules}}))"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip()=='', done.stdout
