"What people's folders, tables, archives and servers are like: the right value, a listed problem, or an error that says which file and what to do."
import errno, io, json, os, struct, tarfile, unicodedata, zipfile, zlib
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as VF
from record_server import RecordServer, record_of_noise, zipped
from ssl_wikichurches.attention.scores import read_boxes, read_maps, score_maps
from ssl_wikichurches.data import codec, download
from ssl_wikichurches.data.archive import archive_explained, DamagedMember, pull, record_files, web_session
from ssl_wikichurches.data.churches import ChurchDataset, box_mask, eval_transform, read_churches, train_transform
from ssl_wikichurches.data.codec import check_image, open_image
from ssl_wikichurches.data.download import download_churches, load_churches, read_manifest, unpack_labels, unpack_shard
from ssl_wikichurches.data.files import read_json
from ssl_wikichurches.data.prepare import prepare
from ssl_wikichurches.data.splits import make_split, read_wc4
from ssl_wikichurches.backbones.encoders import load_backbone
from ssl_wikichurches.finetune.lora import LoraRecipe, fit_lora
from ssl_wikichurches.finetune.semi_supervised import unlabelled
from ssl_wikichurches.study.plan import Run
from ssl_wikichurches.study.report import _narrow
from ssl_wikichurches.study.folders import check_recipe
from ssl_wikichurches.study.runs import best_device

QS = ('Q46261','Q176483','Q236122','Q840829')

def picture(seed, side=32):
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6,6,3), dtype=np.uint8))
    return small.resize((side,side), Image.Resampling.BICUBIC)

def make_set(root, train=3, annotated=1, unlabelled=0, box=(.2,.2,.4,.4)):
    "`train` churches of each style, `annotated` more of each with one box, `unlabelled` without a style."
    (root/'images').mkdir(parents=True)
    kinds = [(q,boxed) for q in QS for boxed in [True]*annotated+[False]*train]+[('',False)]*unlabelled
    churches,notes = {},{}
    for k,(q,boxed) in enumerate(kinds, start=1):
        churches[f'Q{k}'] = dict(id=f'Q{k}', name=f'church {k}', styles=[q]*bool(q))
        picture(k).save(root/f'images/Q{k}_wd0.jpg', quality=92)
        if boxed: notes[f'Q{k}_wd0.jpg'] = dict(styles=[q], bbox_groups=[dict(group_label=0, elements=[dict(label=0, **dict(zip(('left','top','width','height'), box)))])])
    (root/'churches.json').write_text(json.dumps(churches))
    (root/'building_parts.json').write_text(json.dumps(dict(meta=[dict(name='Window', parents=[])], annotations=notes)))
    (root/'style_names.txt').write_text('\n'.join(f'{q} {n}' for q,n in zip(QS, ('Romanesque','Gothic','Renaissance','Baroque'))))
    return root

@pytest.fixture
def root(tmp_path): return make_set(tmp_path/'set')

def edit(root, name, change):
    d = json.loads((root/name).read_text()); change(d); (root/name).write_text(json.dumps(d))
def elements(d, name='Q1_wd0.jpg'): return d['annotations'][name]['bbox_groups'][0]['elements']
def listed(root, **how): return dict(zip(*read_churches(root, on_error='skip', **how).problems[['image','problem']].to_numpy().T))

# ---- units and boxes

@pytest.mark.parametrize('place,unit', [((0,0,60,40),'percent or pixels'), ((.4,.7,20,30),'percent'), ((12,30,160,40),'pixels'), ((-150,.1,.2,.2),'pixels'), ((.1,.1,.2,2.5),'percent')])
def test_boxes_in_another_unit_are_refused_with_their_entry(root, place, unit):
    edit(root, 'building_parts.json', lambda d: elements(d)[0].update(zip(('left','top','width','height'), place)))
    for on_error in ('raise','skip'):
        with pytest.raises(ValueError, match=rf'Q1_wd0.jpg.bbox_groups\[0\].elements\[0\].*{unit}.*fractions'): read_churches(root, on_error)

def test_boxes_that_reach_over_the_edge_are_clipped_as_before(root):
    edit(root, 'building_parts.json', lambda d: elements(d)[0].update(left=-.1, top=.8, width=.3, height=.4))
    assert read_churches(root).boxes.iloc[0,4:].tolist()==pytest.approx([0,.8,.2,.2])

def test_the_same_box_twice_counts_once(root):
    edit(root, 'building_parts.json', lambda d: elements(d).append(dict(elements(d)[0])))
    edit(root, 'building_parts.json', lambda d: elements(d).append(elements(d)[0]|dict(width=.5)))
    churches = read_churches(root)
    assert (churches.boxes.image=='Q1_wd0.jpg').sum()==2 and churches.problems.problem.tolist()==['box of Window stands twice']

@pytest.mark.parametrize('lose', ['flat','missing','broken'])
def test_a_church_with_boxes_is_held_out_whatever_became_of_them(root, lose):
    if lose=='flat': edit(root, 'building_parts.json', lambda d: elements(d)[0].update(width=0.))
    if lose=='missing': (root/'images/Q1_wd0.jpg').unlink()
    if lose=='broken': (root/'images/Q1_wd0.jpg').write_bytes(b'')
    picture(99).save(root/'images/Q1_wd1.jpg') # the same church again
    churches = read_churches(root, 'skip')
    assert 'Q1' in churches.held_out and 'Q1_wd0.jpg' in {*churches.problems.image}
    split = make_split(churches, val=.4)
    assert len(split.eval)==3 and not any(n.startswith('Q1_') for names in split.parts.values() for n in names)

def test_pools_without_labels_leave_such_churches_alone(root):
    make_set(other := root.parent/'other', unlabelled=2)
    edit(other, 'building_parts.json', lambda d: d['annotations'].update({'Q17_wd0.jpg':d['annotations']['Q1_wd0.jpg']|dict(styles=[])}))
    (other/'images/Q17_wd0.jpg').unlink(); picture(99).save(other/'images/Q17_wd1.jpg')
    churches = read_churches(other, 'skip')
    assert unlabelled(churches, make_split(churches, val=.4))==('Q18_wd0.jpg',)

MAPS = torch.rand(2,4,4, generator=torch.Generator().manual_seed(0)); GOOD = [[10.,10,100,100]]
def score(*boxes, names=('a','b')): return score_maps(MAPS[:len(boxes)], [b if isinstance(b, torch.Tensor) else torch.tensor(b, dtype=torch.float) for b in boxes], [*names][:len(boxes)], 224, only=['iou@90','coverage'])

@pytest.mark.parametrize('bad,words', [([float('nan'),5,9,9],'no area'), ([200.,200,150,150],'no area'), ([5.,5,float('inf'),9],'no area'), ([900.,700,1000,900],'outside the frame')])
def test_boxes_beside_a_good_one_are_not_dropped(bad, words):
    with pytest.raises(ValueError, match=f'^a: box.*{words}'): score(GOOD+[bad], GOOD)

def test_fractions_are_no_pixels():
    with pytest.raises(ValueError, match='fractions'): score([[.1,.2,.6,.9]], [[.3,.3,.8,.7]])
    with pytest.raises(ValueError, match='fractions'): score([[0,0,1,1]])
    assert len(score([[0,0,1,1]], GOOD))==4 # one pixel, beside boxes that are none

@pytest.mark.parametrize('format', ['XYWH','CXCYWH','XYXY'])
def test_boxes_of_torchvision_in_the_format_that_they_say(format):
    b = VF.convert_bounding_box_format(tv_tensors.BoundingBoxes(torch.tensor([[10.,20,70,110]]), format='XYXY', canvas_size=(224,224)), new_format=format)
    assert score(b).equals(score([[10,20,70,110]])) and torch.equal(box_mask(b, 224), box_mask(torch.tensor([[10.,20,70,110]]), 224))

def test_turned_boxes_and_other_canvases_are_refused():
    with pytest.raises(ValueError, match='XYWHR'): score(tv_tensors.BoundingBoxes(torch.tensor([[10.,20,60,90,5]]), format='XYWHR', canvas_size=(224,224)))
    with pytest.raises(ValueError, match=r'canvas of \(480, 640\)'): score(tv_tensors.BoundingBoxes(torch.tensor([[10.,20,60,90]]), format='XYXY', canvas_size=(480,640)))

# ---- tables and texts

HEAD = 'image,left,top,right,bottom'

@pytest.mark.parametrize('word', ['None','NA','null','nan','N/A'])
def test_parts_keep_their_names(word, tmp_path):
    (tmp_path/'b.csv').write_text(f'{HEAD},part\na,10,10,100,100,{word}\na,120,20,200,90,Window\nb,5,5,90,80,{word}\n')
    boxes,parts = read_boxes(tmp_path/'b.csv', ['a','b'])
    assert parts==[[word,'Window'],[word]] and len(score_maps(MAPS, boxes, ['a','b'], 224, parts=parts, only=['iou@90']))==3

@pytest.mark.parametrize('text,words', [(f'{HEAD}\na,1,2,30,40,\n','row 2 has 6 fields'), (f'{HEAD}\na,1,2,30,40,Window\n','row 2 has 6'), (f'{HEAD}\na,1,2,30\n','row 2 has 4'), (f'{HEAD}\n\na,"1,5",2,30,40\n',"'1,5' in column left, row 3"),
    ('','is empty'), (f'{HEAD},part\na,1,2,30,40,\n','no part, first row 2'), (f'{HEAD}\na,1,2,30,40\na,1,2,30,40\n','twice, first row 3'), (HEAD.replace(',',';')+'\na;1;2;30;40\n','semicolons'), (f'{HEAD},left\na,1,2,3,4,5\n','two columns'),
    (f'{HEAD}\n"a,1,2,30,40\n','CSV'), (f'{HEAD}\na,inf,2,30,40\n','finite'), (f'{HEAD}\na,30,2,1,40\n','no area, first row 2'), (f'{HEAD}\nb,1,2,30,40\n','no box of 1 images')])
def test_tables_of_boxes_that_are_refused(text, words, tmp_path):
    (tmp_path/'b.csv').write_text(text)
    with pytest.raises(ValueError, match=words) as e: read_boxes(tmp_path/'b.csv', ['a'])
    assert 'b.csv' in str(e.value)

@pytest.mark.parametrize('rows,words', [('','no rows'), ('a,r0,0,1\n',"'r0' in column row"), ('a,.5,0,1\n','no whole number'), ('a,0,0,"1,5"\n',"'1,5' in column value"), ('a,0,1,1\n','expected 4 cells')])
def test_tables_of_maps_that_are_refused(rows, words, tmp_path):
    (tmp_path/'m.csv').write_text('image,row,column,value\n'+rows)
    with pytest.raises(ValueError, match=words) as e: read_maps(tmp_path/'m.csv')
    assert 'm.csv' in str(e.value)

ENCODINGS = ('utf-8-sig','utf-16','utf-16-le','utf-16-be','utf-32')
def marked(text, kind): return {'utf-16-le':b'\xff\xfe', 'utf-16-be':b'\xfe\xff'}.get(kind, b'')+text.replace('\n','\r\n').encode(kind)

@pytest.mark.parametrize('kind', ENCODINGS)
def test_every_text_may_come_from_windows(kind, root):
    before = read_churches(root)
    (root/'labels').mkdir()
    lists = [f'Q{k}_wd0.jpg {QS[0]}' for k in (2,3,4)]
    for p,l in zip(('train','val','test'), lists): (root/f'labels/wc4_{p}.txt').write_bytes(marked(l+'\n', kind))
    (root/'classes.txt').write_text('\n'.join(f'{q} {n}é' for q,n in zip(QS,'abcd')))
    for p in (*root.glob('*.json'), *root.glob('*.txt')): p.write_bytes(marked(p.read_text(), kind))
    after = read_churches(root)
    assert after.images.equals(before.images) and after.boxes.equals(before.boxes) and after.class_names==('aé','bé','cé','dé')
    assert read_wc4(root)['part'].to_dict()=={'Q2_wd0.jpg':'train', 'Q3_wd0.jpg':'val', 'Q4_wd0.jpg':'test'}
    (root/'b.csv').write_bytes(marked(f'{HEAD}\na,1,2,30,40\n', kind))
    assert read_boxes(root/'b.csv', ['a'])[0][0].tolist()==[[1,2,30,40]]

def test_a_code_page_is_refused_with_the_name_of_the_file(root):
    (root/'style_names.txt').write_bytes('Q46261 Römisch'.encode('cp1252'))
    with pytest.raises(ValueError, match='style_names.txt is not UTF-8.*byte 8.*save it as UTF-8'): read_churches(root)
    (root/'x.json').write_text('{"a":1,"a":2}')
    with pytest.raises(ValueError, match="x.json: the key 'a' stands twice"): read_json(root/'x.json')

# ---- lost photographs

def test_links_that_lead_nowhere(root):
    p = root/'images/Q3_wd0.jpg'; p.unlink(); p.symlink_to('../.git/annex/objects/Q3_wd0.jpg')
    with pytest.raises(OSError, match='1 of 16.*Q3_wd0.jpg.*git-annex'): read_churches(root)
    assert [*listed(root)]==['Q3_wd0.jpg'] and prepare(root, 16, workers=1, progress=False).problem['Q3_wd0.jpg']=='missing'

def test_photographs_in_a_folder_of_their_own(root):
    (root/'images/more').mkdir(); os.rename(root/'images/Q3_wd0.jpg', root/'images/more/Q3_wd0.jpg')
    (root/'images/more/Q4_wd0.jpg').write_bytes((root/'images/Q4_wd0.jpg').read_bytes()) # a copy of what is in its place
    with pytest.raises(OSError, match='more/Q3_wd0.jpg.*folder below images'): read_churches(root)
    assert [*listed(root)]==['more/Q3_wd0.jpg']

def test_a_swept_cache_is_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setitem(download.EDITIONS, 'synthetic', dict(n=12, n_annotated=4, size=64, seed=0, several=0.))
    monkeypatch.setenv('WIKICHURCHES_CACHE', str(tmp_path))
    first = load_churches('synthetic')
    for sweep in (lambda: [first.path(n).unlink() for n in first.images.index[5:8]], lambda: (first.root/'churches.json').unlink()):
        sweep()
        again = load_churches('synthetic')
        assert again.images.equals(first.images) and again.boxes.equals(first.boxes) and [p.name for p in tmp_path.iterdir()]==[first.root.name]

def test_what_was_downloaded_and_is_gone(tmp_path, monkeypatch):
    monkeypatch.setenv('WIKICHURCHES_CACHE', str(tmp_path))
    with RecordServer(record_of_noise(n=12)[0]) as s: download_churches(images='all', base=s.base, progress=False)
    for n in ('Q9_wd0.jpg','Q10_wd0.jpg'): (tmp_path/'wikichurches/images'/n).unlink()
    with pytest.raises(OSError, match='2 of 12.*missing, though it was fetched.*--verify'): load_churches('wikichurches')
    assert {*load_churches('wikichurches', 'skip').problems.image}=={'Q9_wd0.jpg','Q10_wd0.jpg'}

@pytest.mark.parametrize('name,disk', [('Q1_wd0 \u00c9glise.jpg', unicodedata.normalize('NFD', 'Q1_wd0 \u00c9glise.jpg')), ('Q1_wd0.jpg','Q1_wd0.JPG'), ('Q1_wd0.jpg','Q1_wd0 .jpg'), ('Q1_wd0.jpg','Q1_wd0.jpeg'), ('Q1_wd0.jpg','Q1_WD0.png')])
def test_a_file_of_nearly_that_name(name, disk, root):
    edit(root, 'building_parts.json', lambda d: d['annotations'].update({name:d['annotations'].pop('Q1_wd0.jpg')}))
    os.rename(root/'images/Q1_wd0.jpg', root/'images'/disk)
    with pytest.raises(OSError) as e: read_churches(root)
    assert repr(disk) in str(e.value) and 'rename it' in str(e.value)
    churches = read_churches(root, 'skip')
    assert not any(disk in names for names in make_split(churches, val=.4).parts.values()) and 'Q1' in churches.held_out

@pytest.mark.parametrize('name,words', [('Thumbs.db',''), ('desktop.ini',''), ('.DS_Store',''), ('Q1_wd0.jpg:Zone.Identifier',''), ('README.txt','form'), ('Q99_wd0.jpg','churches.json')])
def test_litter_is_passed_over_and_strangers_are_listed(name, words, root):
    (root/'images'/name).write_bytes(b'x')
    assert listed(root)=={} if not words else words in listed(root)[name]
    if words:
        with pytest.raises(ValueError, match=words): read_churches(root)
    else: assert len(read_churches(root).images)==16

# ---- photographs

def png(path, values, bits, color, key=None):
    "A PNG by hand: values (h, w, channels), one color transparent."
    chunk = lambda kind, body: struct.pack('>I', len(body))+kind+body+struct.pack('>I', zlib.crc32(kind+body))
    text = [''.join(format(int(v), f'0{bits}b') for v in row.ravel()) for row in values]
    rows = b''.join(b'\0'+int(t.ljust(-(-len(t)//8)*8, '0'), 2).to_bytes(-(-len(t)//8), 'big') for t in text)
    h,w = values.shape[:2]
    path.write_bytes(b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, bits, color, 0, 0, 0))
                     +(chunk(b'tRNS', struct.pack(f'>{len(key)}H', *key)) if key else b'')+chunk(b'IDAT', zlib.compress(rows))+chunk(b'IEND', b''))

@pytest.mark.parametrize('bits', [1,2,4,8,16])
@pytest.mark.parametrize('which', ['black','one','white'])
def test_a_transparent_gray_shows_white_at_every_depth(bits, which, tmp_path):
    top = 2**bits-1; key = dict(black=0, one=1, white=top)[which]
    values = np.array([0, top, top//2, 1]*2)
    png(tmp_path/'a.png', values.reshape(2,4,1), bits, 0, [key])
    assert np.asarray(open_image(tmp_path/'a.png'))[...,0].ravel().tolist()==[255 if v==key else round(v*255/top) for v in values.tolist()]

@pytest.mark.parametrize('bits', [8,16])
def test_a_transparent_color_shows_white_at_every_depth(bits, tmp_path):
    unit = 1 if bits==8 else 256
    values = unit*np.array([[[1,2,3],[3,2,1],[200,100,50]]])
    png(tmp_path/'a.png', values, bits, 2, (unit*np.array([1,2,3])).tolist())
    assert np.asarray(open_image(tmp_path/'a.png'))[0].tolist()==[[255]*3,[3,2,1],[200,100,50]]

END = b'\xff\xd9'
DAMAGE = dict(closed=lambda b, m: b[:m]+END, hole=lambda b, m: b[:m]+bytes(6000)+b[m+6000:], zeros=lambda b, m: b[:m]+bytes(len(b)-m-2)+END, piece=lambda b, m: b[:m]+b[m+6000:], noise=lambda b, m: b[:m]+bytes(range(254))*12+b[m+3048:])

@pytest.mark.parametrize('how', [dict(), dict(progressive=True), dict(restart_marker_rows=1), dict(subsampling=0)], ids=lambda h: '-'.join(h) or 'plain')
@pytest.mark.parametrize('mode', ['RGB','L','CMYK'])
@pytest.mark.parametrize('damage', DAMAGE)
def test_half_a_jpeg_is_damaged(how, mode, damage, tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (160,200,3), dtype=np.uint8)
    Image.fromarray(a).convert(mode).save(tmp_path/'a.jpg', quality=90, **how)
    data = (tmp_path/'a.jpg').read_bytes()
    assert check_image(tmp_path/'a.jpg')==''
    (tmp_path/'b.jpg').write_bytes(DAMAGE[damage](data, len(data)//2))
    assert 'b.jpg' in check_image(tmp_path/'b.jpg')

@pytest.mark.parametrize('trailer', [b'\0'*500, b'a film'*50, b'a film'+bytes(500), b'\xff\xd8\xff\xe0'+b'x'*200, b'\n'])
def test_what_follows_the_end_of_a_picture_is_no_damage(trailer, tmp_path):
    picture(1).save(tmp_path/'a.jpg'); whole = open_image(tmp_path/'a.jpg')
    with open(tmp_path/'a.jpg', 'ab') as f: f.write(trailer)
    assert check_image(tmp_path/'a.jpg')=='' and open_image(tmp_path/'a.jpg').tobytes()==whole.tobytes()

@pytest.mark.parametrize('data,words', [(b'','empty'), (b'<!DOCTYPE html><html>','page of the web'), (b'\xef\xbb\xbf  <?xml version="1.0"?>','page of the web'), (bytes(100),'zeros'), (b'version https://git-lfs.github.com/spec/v1','Git LFS'),
                                        (b'/annex/objects/SHA256E-s1--x.jpg','git-annex'), (b'\0\0\0\x18ftypheic\0\0\0\0','HEIC'), (b'Q46261 Romanesque','none of JPEG')])
def test_what_is_no_picture_is_said(data, words, tmp_path):
    (tmp_path/'Q7_wd0.jpg').write_bytes(data)
    assert 'Q7_wd0.jpg' in (said := check_image(tmp_path/'Q7_wd0.jpg')) and words in said

@pytest.mark.parametrize('w,h', [(1,2000), (2000,1), (3,900)])
def test_a_strip_needs_no_gigabytes(w, h, root):
    Image.new('RGB', (w,h), (9,99,9)).save(root/'images/Q1_wd0.jpg')
    churches = read_churches(root)
    for make in (eval_transform, train_transform):
        tfm = make(224, 'crop')
        most = []
        for step in tfm.transforms: step.register_forward_hook(lambda m, i, o: most.append((o[0] if isinstance(o, tuple) else o).numel())) if isinstance(step, torch.nn.Module) else None
        item = ChurchDataset(churches, ['Q1_wd0.jpg'], tfm)[0]
        assert item['image'].shape==(3,224,224) and most and max(most)<=3*256*256*17
        assert torch.allclose(item['image'].mean((1,2))*255, torch.tensor([9.,99,9]), atol=30)
        for step in tfm.transforms: getattr(step, '_forward_hooks', {}).clear()

def test_a_strip_keeps_its_middle():
    image = torch.zeros(3,2000,4); image[:,990:1010] = 1
    cut,boxes = eval_transform(28, 'crop')(tv_tensors.Image(image), tv_tensors.BoundingBoxes([[0.,990,4,1010]], format='XYXY', canvas_size=(2000,4)))
    assert cut.shape==(3,28,28) and cut.min()==1 and box_mask(boxes, 28).all()

# ---- prepare

def test_a_passing_trouble_is_not_remembered(root, monkeypatch):
    real = open
    def refused(path, *args):
        if str(path).endswith('Q3_wd0.jpg'): raise OSError(errno.EMFILE, 'Too many open files', str(path))
        return real(path, *args)
    with monkeypatch.context() as m:
        m.setattr(codec, 'open', refused, raising=False)
        table = prepare(root, 16, workers=1, progress=False)
        assert 'cannot read Q3_wd0.jpg: Too many open files' in table.problem['Q3_wd0.jpg'] and 'Q3_wd0.jpg' in listed(root)
    assert len(read_churches(root).images)==16
    assert prepare(root, 16, workers=1, progress=False).made.to_dict()=={n:n=='Q3_wd0.jpg' for n in table.index}

def test_a_disk_that_fills_up_costs_no_more_than_the_last_copies(root, monkeypatch):
    real,written = Path.write_bytes,[]
    def full(self, data):
        if self.parent.name=='prepared-16' and len(written)>=6 and data[:2]==b'\xff\xd8': raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if data[:2]==b'\xff\xd8': written.append(self)
        return real(self, data)
    with monkeypatch.context() as m:
        m.setattr(Path, 'write_bytes', full)
        with pytest.raises(OSError, match='prepared-16.*make room'): prepare(root, 16, workers=1, progress=False)
    assert not [*(root/'prepared-16').glob('.*')]
    assert prepare(root, 16, workers=1, progress=False).made.sum()==10

# ---- archives and servers

def shard(path, *members):
    with tarfile.open(path, 'w') as t:
        for n,data in members: m = tarfile.TarInfo(n); m.size = len(data); t.addfile(m, io.BytesIO(data))
    return path

@pytest.mark.parametrize('wanted,members', [('Q1_wd0.jpg', (('annotations/Q1_wd0.png',b'mask'),('images/Q1_wd0.jpg',b'photo'))), ('Q1_wd0.png', (('Q1_wd0.jpg',b'thumbnail'),('Q1_wd0.png',b'photo'))), ('Q1_wd0.jpg', (('a/Q1_wd0.jpg',b'photo'),('b/Q1_wd0.jpg',b'photo'))),
                                            ('Q1_wd0.tif', (('._Q1_wd0.jpg',b'x'),('Q1_wd0.jpg',b'photo')))])
def test_the_photograph_of_a_shard_is_chosen_after_all_were_seen(wanted, members, tmp_path):
    assert unpack_shard(shard(tmp_path/'s.tar', *members), [wanted], tmp_path)[f'images/{wanted}']['state']=='fetched' and (tmp_path/'images'/wanted).read_bytes()==b'photo'

@pytest.mark.parametrize('members', [(('Q1_wd0.jpg',b'old'),('Q1_wd0.jpg',b'photo')), (('a/Q1_wd0.jpg',b'one'),('b/Q1_wd0.jpg',b'two')), (('masks/Q1_wd0.png',b'mask'),('Q1_wd0.tif',b'scan'))])
def test_two_that_differ_are_refused(members, tmp_path):
    with pytest.raises(ValueError, match='s.tar has 2 pictures for Q1_wd0.jpg'): unpack_shard(shard(tmp_path/'s.tar', *members), ['Q1_wd0.jpg','Q2_wd0.jpg'], tmp_path)
    assert not [*(tmp_path/'images').iterdir()]

def test_two_label_lists_of_one_name(tmp_path):
    (tmp_path/'labels.zip').write_bytes(zipped({'labels/a.txt':b'1','a.txt':b'2'}))
    with pytest.raises(ValueError, match='labels.zip has two files labels/a.txt'): unpack_labels(tmp_path)

@pytest.mark.parametrize('how', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED])
def test_one_damaged_member_is_left_out_whatever_packed_it(how, tmp_path):
    members = {f'labels/{n}.txt':bytes(np.random.default_rng(i).integers(0, 256, 3000, dtype=np.uint8)) for i,n in enumerate('abc')}
    data = bytearray(zipped(members, how)); info = zipfile.ZipFile(io.BytesIO(bytes(data))).getinfo('labels/b.txt')
    at = info.header_offset+30+len('labels/b.txt')+info.compress_size//2; data[at:at+200] = bytes(b^255 for b in data[at:at+200])
    (tmp_path/'labels.zip').write_bytes(data)
    assert {p:f['state'] for p,f in unpack_labels(tmp_path).items()}=={'labels/a.txt':'fetched', 'labels/b.txt':'damaged', 'labels/c.txt':'fetched'}
    assert sorted(p.name for p in (tmp_path/'labels').iterdir())==['a.txt','c.txt']

@pytest.mark.parametrize('data', [b'', b'<html>', b'PK\3\4', b'PK\5\6'+bytes(10), bytes(600), b'x'*2000])
@pytest.mark.parametrize('name', ['labels.zip','s.tar'])
def test_what_is_no_archive_is_named(data, name, tmp_path):
    (tmp_path/name).write_bytes(data)
    if name=='s.tar' and data==bytes(600): return # an empty tar file
    with pytest.raises(OSError, match=f'{name} cannot be read'): unpack_labels(tmp_path) if name=='labels.zip' else unpack_shard(tmp_path/name, ['Q1_wd0.jpg'], tmp_path)

def test_errors_of_disk_and_network_pass_through_the_explanation():
    for e in (OSError(errno.ENOSPC, 'full'), ConnectionError('gone'), FileNotFoundError('x'), ValueError('refused')):
        with pytest.raises(type(e)) as found, archive_explained('a.zip'): raise e
        assert found.value is e
    with pytest.raises(DamagedMember, match='a.zip.*Invalid data stream'), archive_explained('a.zip', DamagedMember): raise OSError('Invalid data stream')

class Breaks(list):
    "Every second answer breaks off in its middle, without end."
    n,size = 0,0
    def __bool__(self): return True
    def pop(self, i=-1): self.n += 1; return self.size//2 if self.n%2 else self.size

def test_a_wrong_checksum_over_a_line_that_breaks_has_an_end(tmp_path):
    files,_ = record_of_noise(n=4)
    with RecordServer(files) as s:
        s.md5['images.zip'] = '0'*32; s.cuts = Breaks(); s.cuts.size = len(files['images.zip'])
        session = web_session(retries=1, backoff=.01)
        with pytest.raises(OSError, match='not what the record lists.*3 transfers'): pull(session, record_files(session, s.base)['images.zip'], tmp_path/'z')
        assert s.sent<=3.1*s.cuts.size and not [*tmp_path.iterdir()]

def test_a_server_that_encodes_what_it_was_not_asked_to(tmp_path, monkeypatch):
    files,_ = record_of_noise(n=4)
    with RecordServer(files) as s:
        handler = s.http.RequestHandlerClass; real = handler.file
        monkeypatch.setattr(handler, 'file', lambda self, data, headers: real(self, data, headers|{'Content-Encoding':'gzip'}))
        session = web_session(retries=0)
        with pytest.raises(OSError, match='labels.zip encoded as gzip'): pull(session, record_files(session, s.base)['labels.zip'], tmp_path/'l.zip')

def test_a_mirror_out_of_reach(monkeypatch):
    monkeypatch.setattr('time.sleep', lambda seconds: None) # between attempts
    with pytest.raises(ConnectionError, match='someone/Mirror.*run again later'):
        download.mirror_shards('someone/Mirror', 'http://127.0.0.1:9')
    with pytest.raises(ValueError): download.mirror_shards('not a name!', 'http://127.0.0.1:9')

@pytest.mark.parametrize('text', ['{', '[]', '{"files":{}}', '{"record":"1","base":"","selections":{},"files":{},"shards":{}}'])
def test_a_manifest_that_is_none(text, tmp_path):
    (tmp_path/'download.json').write_text(text)
    with pytest.raises(ValueError, match='delete it and run the download again'): read_manifest(tmp_path)

# ---- studies

def test_what_was_left_out_stays_left_out(root):
    p = root/'images/Q3_wd0.jpg'; p.write_bytes(p.read_bytes()[:400])
    edit(root, 'building_parts.json', lambda d: elements(d)[0].update(width=0.))
    verified = load_churches(root, 'skip')
    verified.problems.to_csv(root/'problems.csv', index=False)
    again = load_churches(root, 'skip', verify=False, known=root/'problems.csv')
    assert 'Q3_wd0.jpg' in load_churches(root, 'skip', verify=False).images.index and again.images.equals(verified.images) and again.boxes.equals(verified.boxes)
    assert again.held_out==verified.held_out=={'Q1','Q5','Q9','Q13'}

@pytest.mark.parametrize('train,words', [(1,'two churches of a style.*1 Romanesque, 1 Gothic, 1 Renaissance, 1 Baroque'), (0,'two churches of a style'), (2,'validation would take 1 of 8 churches')])
def test_small_folders_are_answered_in_churches(train, words, tmp_path):
    with pytest.raises(ValueError, match=words): make_split(read_churches(make_set(tmp_path/'set', train=train)))

def test_a_share_that_is_too_small_or_too_large(root):
    churches = read_churches(root)
    with pytest.raises(ValueError, match='validation would take 1 of 12.*another val than 0.01'): make_split(churches, val=.01)
    with pytest.raises(ValueError, match='validation would take 11 of 12'): make_split(churches, val=.9)
    assert len(make_split(churches, val=.34).val)==5

def test_adapters_and_classifier_have_rates_of_their_own(two_dozen):
    recipe = LoraRecipe(epochs=1, lr=1e-3, adapter_lr=1e-4)
    history = fit_lora(load_backbone('tiny-clip'), two_dozen, recipe).history
    assert {'lr_adapters','lr_classifier'}<={*history} and (history.lr_classifier/history.lr_adapters).round(6).eq(10).all()
    with pytest.raises(ValueError, match='adapter_lr -1'): LoraRecipe(adapter_lr=-1.)

def test_a_run_made_before_a_field_was_there_is_complete(tmp_path):
    run = Run('m', 'tiny-clip', 'lora', 0, asdict(LoraRecipe()), 'synthetic', 'leaf', 'squash', 0, 'raise', 'key')
    old = asdict(run); del old['recipe']['adapter_lr']
    (tmp_path/'recipe.json').write_text(json.dumps(old)); (tmp_path/'run.json').write_text('{}')
    assert check_recipe(tmp_path, run)
    with pytest.raises(ValueError, match='adapter_lr'): check_recipe(tmp_path, replace(run, recipe=asdict(LoraRecipe(adapter_lr=1e-3))))

@pytest.mark.parametrize('cuda,mps,best', [(True,True,'cuda'), (False,True,'mps'), (False,False,'cpu')])
def test_the_best_device(cuda, mps, best, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda); monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
    assert best_device()==best

def test_a_printed_table_has_no_empty_and_no_repeated_column():
    text = pd.DataFrame(dict(n=[60,60], seeds=[1,1], over=['one model']*2, verdict=['one model']*2, task=['',''], shift=['+.01','+.02'], low=['0','+.01'], models_low=['0','+.01'], note=['','']), index=pd.MultiIndex.from_tuples([('m','lora'),('m','full')], names=['model','tier']))
    first,head,*_ = _narrow(text).splitlines()
    assert first=='n 60, seeds 1' and head.split()==['verdict','shift','low']
    assert [l.split() for l in _narrow(text.assign(n=[60,59])).splitlines()][0]==['seeds','1']
