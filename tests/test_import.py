"Annotated photographs of other collections: every box and mask, after every geometry, against an oracle that knows no code of ours."
import json, re
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from pycocotools import mask as coco_mask
from ssl_wikichurches.attention.scores import score_maps
from ssl_wikichurches.cli import wikichurches_import
from ssl_wikichurches.data.churches import CHURCH, GEOMETRIES, ChurchDataset, box_mask, eval_transform, reworded, train_transform
from ssl_wikichurches.data.download import load_churches
from ssl_wikichurches.data.importing import dataset_format, import_dataset, read_coco, write_dataset
from ssl_wikichurches.data.outlines import inside, mask_rle, outline_text, ring_edges, rle_edges, rle_mask
from ssl_wikichurches.data.splits import make_split
from ssl_wikichurches.finetune.attn_supervised import union_masks

SIZES = {'oak/a.png':(120,80), 'oak/b.png':(60,90), 'fir/c.png':(80,80), 'fir/d.png':(200,50)} # width, height
BOXES = {n:[(.1*w,.2*h,.5*w,.7*h), (.55*w,.4*h,.95*w,.9*h)] for n,(w,h) in SIZES.items()} # left, top, right, bottom: whole pixels
KINDS = 'leaf','stem'

@pytest.fixture
def photos(tmp_path):
    folder = tmp_path/'photos'
    for k,(n,size) in enumerate(SIZES.items()):
        (folder/n).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*size[::-1],3), 40+k, np.uint8)).save(folder/n)
    return folder

def as_coco(folder, path, shape=lambda b, size: {}):
    images = [dict(id=i, file_name=n, width=w, height=h) for i,(n,(w,h)) in enumerate(SIZES.items())]
    notes = [dict(id=10*i+k, image_id=i, category_id=k, bbox=[b[0],b[1],b[2]-b[0],b[3]-b[1]], **shape(b, SIZES[n]))
             for i,n in enumerate(SIZES) for k,b in enumerate(BOXES[n])]
    path.write_text(json.dumps(dict(images=images, annotations=notes, categories=[dict(id=k, name=s, supercategory='plant') for k,s in enumerate(KINDS)])))
    return path

def as_voc(folder, path):
    (path/'Annotations').mkdir(parents=True)
    one = lambda k, b: f'<object><name>{KINDS[k]}</name><bndbox><xmin>{b[0]+1}</xmin><ymin>{b[1]+1}</ymin><xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>'
    for i,(n,(w,h)) in enumerate(SIZES.items()):
        (path/f'Annotations/{i}.xml').write_text(f'<annotation><filename>{n}</filename><size><width>{w}</width><height>{h}</height></size>{"".join(one(*kb) for kb in enumerate(BOXES[n]))}</annotation>')
    return path

def as_yolo(folder, path):
    (path/'data.yaml').parent.mkdir(parents=True); (path/'data.yaml').write_text('names:\n  0: leaf\n  1: stem\n')
    folder.rename(path/'images')
    for n,(w,h) in SIZES.items():
        (note := (path/'labels'/n).with_suffix('.txt')).parent.mkdir(parents=True, exist_ok=True)
        note.write_text('\n'.join(f'{k} {(b[0]+b[2])/2/w} {(b[1]+b[3])/2/h} {(b[2]-b[0])/w} {(b[3]-b[1])/h}' for k,b in enumerate(BOXES[n])))
    return path

def as_table(folder, path, unit='pixels', ends=('right','bottom')):
    rows = []
    for n,size in SIZES.items():
        for k,b in enumerate(BOXES[n]):
            l,t,r,u = (v*{'pixels':1, 'fractions':1/s, 'percent':100/s}[unit] for v,s in zip(b, (*size,*size)))
            rows.append(dict(image=n, left=l, top=t, **dict(zip(ends, (r,u) if ends[0]=='right' else (r-l,u-t))), part=KINDS[k]))
    pd.DataFrame(rows).to_csv(path, index=False)
    return path

def as_cub(folder, path):
    path.mkdir(); folder.rename(path/'images'); (path/'parts').mkdir()
    files = [*SIZES]
    text = dict(images=files, classes=['oak','fir'], image_class_labels=['1','1','2','2'], train_test_split=['0']*4,
                bounding_boxes=[f'{b[0]} {b[1]} {b[2]-b[0]} {b[3]-b[1]}' for b in (BOXES[n][0] for n in files)])
    text['parts/parts'] = ['beak']
    for name,lines in text.items(): (path/f'{name}.txt').write_text('\n'.join(f'{i} {l}' for i,l in enumerate(lines, 1)))
    (path/'parts/part_locs.txt').write_text('\n'.join(f'{i} 1 {BOXES[n][0][0]} {BOXES[n][0][1]} 1' for i,n in enumerate(files, 1)))
    return path

def oracle(box, size, geometry, s):
    "Where a box lands, by arithmetic on paper; None where it is cut away."
    (w,h),(l,t,r,b) = size,box
    if geometry=='squash': x,y,kx,ky = 0,0,s/w,s/h
    elif geometry=='letterbox':
        k = s/max(w,h); nw,nh = round(w*k),round(h*k)
        x,y,kx,ky = (s-nw)//2,(s-nh)//2,nw/w,nh/h
    else:
        first = round(s*256/224); k = first/min(w,h); nw,nh = (first,int(first*h/w)) if w<=h else (int(first*w/h),first)
        x,y,kx,ky = -round((nw-s)/2),-round((nh-s)/2),nw/w,nh/h
    found = np.array([x+l*kx, y+t*ky, x+r*kx, y+b*ky]).clip(0, s)
    return found if found[2]>found[0] and found[3]>found[1] else None

FORMATS = {'coco':(as_coco,'coco.json',{}), 'voc':(as_voc,'voc',{}), 'yolo':(as_yolo,'yolo',{}), 'cub':(as_cub,'cub',dict(side=0.)), 'pixels':(as_table,'t.csv',dict(unit='pixels')),
           'percent':(lambda f, p: as_table(f, p, 'percent'),'t.csv',dict(unit='percent')),
           'fractions':(lambda f, p: as_table(f, p, 'fractions', ('width','height')),'t.csv',dict(unit='fractions'))}

@pytest.mark.parametrize('name', FORMATS)
def test_every_box_of_every_format_after_every_geometry(name, photos, tmp_path):
    write,file,how = FORMATS[name]
    path = write(photos, tmp_path/file)
    assert dataset_format(path)==('table' if file=='t.csv' else name)
    churches = load_churches(import_dataset(path, tmp_path/'made', photos if photos.is_dir() else '', 'folder' if name!='cub' else '', ('tree','trees'), **how))
    assert {*churches.class_names}=={'oak','fir'} if name=='cub' else {'oak','fir'}<={*churches.class_names}
    source = pd.read_csv(tmp_path/'made/sources.csv').set_index('image').source
    for geometry in GEOMETRIES:
        for item in ChurchDataset(churches, [*churches.images.index], eval_transform(56, geometry)):
            n = next(k for k in SIZES if source[item['name']].endswith(k))
            want = [b for b in (oracle(b, SIZES[n], geometry, 56) for b in (BOXES[n][:1] if name=='cub' else BOXES[n])) if b is not None]
            np.testing.assert_allclose(item['boxes'].numpy(), np.array(want).reshape(-1,4), atol=2e-3, err_msg=f'{name} {geometry} {n}')

def disc(size):
    y,x = np.mgrid[:size[1],:size[0]]+.5
    return ((x/size[0]-.55)**2+(y/size[1]-.5)**2*1.4)<.13

def as_masks(kind):
    def shape(b, size):
        if kind=='polygon': return dict(segmentation=[[b[0],b[1],b[2],b[1],(b[0]+b[2])/2,b[3]]])
        m = disc(size)
        return dict(segmentation=mask_rle(m) if kind=='runs' else {k:v.decode() if isinstance(v, bytes) else v for k,v in coco_mask.encode(np.asfortranarray(m.astype(np.uint8))).items()})
    return shape

@pytest.mark.parametrize('kind', ['polygon','runs','compressed'])
def test_masks_are_scored_as_masks_after_every_geometry(kind, photos, tmp_path):
    churches = load_churches(import_dataset(as_coco(photos, tmp_path/'coco.json', as_masks(kind)), tmp_path/'made', photos, 'folder'))
    source = pd.read_csv(tmp_path/'made/sources.csv').set_index('image').source
    s = 64
    for geometry in GEOMETRIES:
        for item in ChurchDataset(churches, [*churches.images.index], eval_transform(s, geometry)):
            n = source[item['name']]; (w,h),got = SIZES[n],box_mask(item['boxes'], s).numpy()
            x0,y0,x1,y1 = oracle_frame((w,h), geometry, s)
            px,py = np.meshgrid(((np.arange(s)+.5)-x0)/(x1-x0)*w, ((np.arange(s)+.5)-y0)/(y1-y0)*h) # where on the photograph the centers lie
            seen = (px>=0)&(px<w)&(py>=0)&(py<h)
            if kind=='polygon': want = np.any([in_triangle(px, py, b) for b in BOXES[n]], axis=0)&seen
            else: want = np.where(seen, disc((w,h))[py.astype(int).clip(0, h-1),px.astype(int).clip(0, w-1)], False)
            assert (got!=want).sum()<=2, f'{kind} {geometry} {n}: {(got!=want).sum()} pixels differ' # centers on an edge, in float32

def oracle_frame(size, geometry, s):
    "Left, top, right and bottom of the whole photograph in the frame, not clipped."
    w,h = size
    if geometry=='squash': return 0,0,s,s
    if geometry=='letterbox':
        k = s/max(w,h); nw,nh = round(w*k),round(h*k); x,y = (s-nw)//2,(s-nh)//2
        return x,y,x+nw,y+nh
    first = round(s*256/224); nw,nh = (first,int(first*h/w)) if w<=h else (int(first*w/h),first)
    x,y = -round((nw-s)/2),-round((nh-s)/2)
    return x,y,x+nw,y+nh

def in_triangle(x, y, b):
    "By three half planes."
    a = [(b[0],b[1]),(b[2],b[1]),((b[0]+b[2])/2,b[3])]
    return np.all([(q[0]-p[0])*(y-p[1])-(q[1]-p[1])*(x-p[0])>=0 for p,q in zip(a, a[1:]+a[:1])], axis=0)

def test_a_map_on_the_mask_beats_a_map_on_the_corners_of_its_box(photos, tmp_path):
    churches = load_churches(import_dataset(as_coco(photos, tmp_path/'coco.json', as_masks('runs')), tmp_path/'made', photos, 'folder'))
    items = [*ChurchDataset(churches, [*churches.images.index], eval_transform(64))]
    masks = union_masks([i['boxes'] for i in items], 64)
    plain = torch.stack([box_mask(i['boxes'][:,:4], 64) for i in items])
    on,corners = ((m.float()+torch.rand(m.shape, generator=torch.Generator().manual_seed(0))*1e-3) for m in (masks, plain&~masks))
    score = lambda maps: score_maps(maps, [i['boxes'] for i in items], [i['name'] for i in items], 64, only=['auroc','iou@area']).groupby('metric').value.mean()
    assert score(on)['iou@area']==1 and score(corners)['iou@area']<.3 and score(on).auroc==1
    parts = score_maps(on, [i['boxes'] for i in items], [i['name'] for i in items], 64, only=['auroc'], parts=[[*i['parts']] for i in items])
    assert {*parts.part}==set(KINDS)

def test_outlines_follow_flips_and_crops_of_training(photos, tmp_path):
    "The photograph is the witness: its mask is painted on it."
    for n,size in SIZES.items(): Image.fromarray((disc(size)[...,None]*np.array([255,255,255])).astype(np.uint8)).save(photos/n)
    churches = load_churches(import_dataset(as_coco(photos, tmp_path/'coco.json', as_masks('runs')), tmp_path/'made', photos, 'folder'))
    torch.manual_seed(0)
    for item in [i for _ in range(4) for i in ChurchDataset(churches, [*churches.images.index], train_transform(64))]:
        mask,white = box_mask(item['boxes'], 64),item['image'].mean(0)>.35
        assert (mask&white).sum()/(mask|white).sum()>.88

def test_rectangles_are_boxes_however_they_are_written():
    for box in ((3,5,20,31), (.5,.5,8.5,63.5), (7.2,1.1,7.9,60.3)):
        l,t,r,b = box
        ring = ring_edges([[(l,t),(r,t),(r,b),(l,b)]])
        assert np.array_equal(inside(ring, 64), box_mask(torch.tensor([box]), 64).numpy())
        assert np.array_equal(inside(ring_edges([[(l,t),(l,b),(r,b),(r,t)]]*2), 64), inside(ring, 64)) # turned the other way, and twice
    m = np.zeros((48,48), bool); m[5:31,3:20] = True; m[40:44,:] = True; m[20:25,10:12] = False
    assert np.array_equal(inside(rle_edges(mask_rle(m))*48, 48), m) and np.array_equal(rle_mask(mask_rle(m)), m)
    rng = np.random.default_rng(0)
    for _ in range(20):
        m = rng.random((13,17))<rng.random()
        assert np.array_equal(inside(rle_edges(mask_rle(m))*[17,13,17,13], 17)[:13], m)
        assert mask_rle(m)['counts']==as_counts(m)

def as_counts(m):
    out,now,n = [],False,0
    for v in m.ravel(order='F'):
        if v!=now: out.append(n); now,n = v,0
        n += 1
    return [*out, n]

def test_what_cannot_be_known_is_refused(photos, tmp_path):
    turned = Image.open(photos/'oak/a.png'); exif = Image.Exif(); exif[0x0112] = 6
    turned.save(photos/'oak/a.png', exif=exif)
    with pytest.raises(ValueError, match='before or after'): read_coco(as_coco(photos, tmp_path/'coco.json'), photos)
    assert dataset_format(tmp_path/'nothing')=='' and dataset_format(photos)==''
    (tmp_path/'d').mkdir(); (tmp_path/'d/dataset.json').write_text('{"group":"b<i>rd","groups":"birds"}')
    from ssl_wikichurches.data.churches import read_called
    with pytest.raises(ValueError, match='expected words'): read_called(tmp_path/'d')
    with pytest.raises(ValueError, match='which is meant'): outline_text(dict(outline=[[[0,0],[1,0],[1,1]]], rle={}), 'x')

def test_the_command_and_what_groups_are_called(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_coco(photos, photos/'coco.json')
    pd.DataFrame({'image':[*SIZES], 'class':['x','x','y','y'], 'group':['p1','p1','p2','p3']}).to_csv('labels.csv', index=False)
    wikichurches_import('photos/coco.json', out='made', photographs='photos', labels='labels.csv', group='patient')
    assert '4 images of 3 patients' in capsys.readouterr().out
    churches = load_churches('made')
    assert churches.called==('patient','patients') and churches.parts.name.tolist()==['leaf','stem','plant'] and churches.parts.parents[0]==[2]
    assert len({*churches.groups(churches.images.index)})==3
    with pytest.raises(SystemExit, match='say which of pixels'): as_table(photos, photos/'t.csv'); wikichurches_import('photos/t.csv', labels='folder')
    text = 'churches/x.csv: 3 churches, church by church. Churches of churches.json'
    assert reworded(text, CHURCH)==text and reworded(text, ('patient','patients'))=='churches/x.csv: 3 patients, patient by patient. Patients of churches.json'

def test_some_groups_keep_their_boxes_and_the_others_train(photos, tmp_path):
    found = [p for k in range(8) for p in read_coco(as_coco(photos, tmp_path/'coco.json'), photos)]
    from dataclasses import replace
    from ssl_wikichurches.data.importing import keep_boxes, with_labels
    found = [replace(p, name=f'{k}/{p.name}', group=f'g{k%16}') for k,p in enumerate(with_labels(found, 'folder'))]
    kept = keep_boxes(found, .25, seed=1)
    assert {p.group for p in kept if p.parts}&{p.group for p in kept if not p.parts}==set() and [*map(bool, (p.parts for p in keep_boxes(found)))]==[True]*32
    churches = load_churches(write_dataset(kept, tmp_path/'made'))
    split = make_split(churches, val=.3)
    assert split.train and not {*churches.groups(split.train)}&{*churches.groups(split.eval)}

def test_tree_crowns_through_import_study_and_report(tmp_path, few_questions):
    "Real photographs of another kind: crowns in aerial photographs (tests/crowns/README.md)."
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    from ssl_wikichurches.study.analysis import analyse
    from ssl_wikichurches.study.plan import Study
    from ssl_wikichurches.study.reader import open_study
    from ssl_wikichurches.study.report import result_text, write_report
    from ssl_wikichurches.study.runs import run_study
    folder = import_dataset(Path(__file__).parent/'crowns', tmp_path/'crowns', labels='folder', called=('tile','tiles'), keep=.5)
    churches = load_churches(folder)
    assert churches.class_names==('plain','slope') and churches.parts.name.tolist()==['Tree'] and churches.images.annotated.sum()==14 and churches.called==('tile','tiles')
    study = Study('crowns', data=str(folder), models=('tiny-clip',), tiers=('lora',), size=64, val=.3, measure='every_epoch', recipes=dict(lora=dict(epochs=2, lr=1e-3)))
    with ThreadPoolExecutor(1) as pool: opened = open_study(run_study(study, tmp_path, pool, device='cpu', progress=False))
    analysis = analyse(opened)
    text,html = result_text(analysis),write_report(analysis).read_text()
    assert 'over 14 tiles' in text and 'church' not in text.lower()
    said = re.sub(r'src="[^"]*"|<style.*?</style>', '', html, flags=re.S)
    assert '14 held-out images of 14 tiles' in ' '.join(said.split()) and 'When it moves' in said
    assert not re.search(r'\bchurch(es)?\b(?!\.json)', said, re.I), re.search(r'.{40}\bchurch.{40}', said, re.I|re.S)
    caption = json.loads((opened.path/'tables/tables.json').read_text())['tables']['when']
    assert caption['n']=='14 tiles' and analysis['turns'].looks.tolist()==[3]
