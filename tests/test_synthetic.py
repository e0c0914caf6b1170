"Synthetic churches: bytes by seed, a complete folder, boxes in range and true to the pixels, errors."
import json
from collections import Counter
from unittest.mock import patch
import numpy as np, pytest
from PIL import Image
from ssl_wikichurches import synthetic
from ssl_wikichurches.data import CLASSES, STYLES, read_churches
from ssl_wikichurches.parts import DRAWN, ONTOLOGY, Pen, draw_part
from ssl_wikichurches.synthetic import PartBox, draw_church, make_churches, plan_church

def files(root): return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob('*') if p.is_file()}
def annotations(root): return json.loads((root/'building_parts.json').read_text())

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make_churches(tmp_path_factory.mktemp('churches')/'default')

def test_same_arguments_same_bytes(tmp_path):
    a,b = (make_churches(tmp_path/o, n=14, n_annotated=5, seed=3) for o in 'ab')
    assert files(a)==files(b)

def test_another_seed_is_another_set(tmp_path):
    a,b = (files(make_churches(tmp_path/str(seed), n=8, n_annotated=2, seed=seed)) for seed in (0,1))
    assert not {v for k,v in a.items() if k.endswith('jpg')} & {v for k,v in b.items() if k.endswith('jpg')}

def test_a_larger_set_begins_with_a_smaller_one(tmp_path):
    small,large = (make_churches(tmp_path/str(n), n=n, n_annotated=4) for n in (12,30))
    images = {k: v for k,v in files(small).items() if k.startswith('images/')}
    assert images.items() <= files(large).items()
    assert annotations(small)==annotations(large)

def test_global_random_state_is_left_alone():
    np.random.seed(0); before = np.random.get_state()[1].copy()
    a = draw_church('Gothic', 1)[0].tobytes()
    np.random.seed(5)
    assert draw_church('Gothic', 1)[0].tobytes()==a
    np.random.seed(0); assert (np.random.get_state()[1]==before).all()

def test_layout_is_complete(folder):
    assert sorted(p.name for p in folder.iterdir())==['building_parts.json','churches.json','images','parent_child_rel.txt','style_names.txt']
    churches,names = json.loads((folder/'churches.json').read_text()),[p.name for p in (folder/'images').iterdir()]
    assert len(names)==420 and {o.split('_')[0] for o in names}==set(churches)
    assert all(k==v['id'] and set(v)=={'id','name','built_year','styles','country','location'} for k,v in churches.items())
    assert (folder/'style_names.txt').read_text().splitlines()==[f'{k} {v}' for k,v in STYLES.items()]
    for name in names[::40]:
        with Image.open(folder/'images'/name) as image: assert image.size==(96,96) and image.mode=='RGB'

def test_the_reader_takes_it_without_problems(folder):
    churches = read_churches(folder)
    assert len(churches.problems)==0 and len(churches.images)==420 and churches.images.annotated.sum()==60

def test_imbalance_and_annotated_churches(folder):
    churches = json.loads((folder/'churches.json').read_text())
    counts = Counter(churches[p.name.split('_')[0]]['styles'][0] for p in (folder/'images').iterdir())
    assert set(counts)==set(STYLES) and min(counts.values())>=45 and max(counts.values())>2*min(counts.values())
    annotated = list(annotations(folder)['annotations'])
    assert len(annotated)==60==len({o.split('_')[0] for o in annotated})
    assert {churches[o.split('_')[0]]['styles'][0] for o in annotated}==set(STYLES)

def test_some_churches_have_several_photographs(folder):
    photos = Counter(p.name.split('_')[0] for p in (folder/'images').iterdir())
    assert set(photos.values())=={1,2,3} and 380<=len(photos)<=400
    church = next(k for k,v in photos.items() if v>1)
    assert (folder/'images'/f'{church}_wd0.jpg').read_bytes()!=(folder/'images'/f'{church}_wd1.jpg').read_bytes()

def test_boxes_are_in_range_and_named_in_meta(folder):
    data = annotations(folder)
    meta = data['meta']
    assert {m['name'] for m in meta}>=set(ONTOLOGY) and len({m['name'] for m in meta})==len(meta)
    for k,m in enumerate(meta): assert all(0<=q<len(meta) and q!=k for q in m['parents'])
    for name,o in data['annotations'].items():
        elements = [e for g in o['bbox_groups'] for e in g['elements']]
        assert 2<=len(elements)<=7 and all(e['label']==g['group_label'] for g in o['bbox_groups'] for e in g['elements'])
        for e in elements:
            assert 0<=e['label']<len(meta) and e['left']>=0 and e['top']>=0
            assert e['left']+e['width']<=1+1e-6 and e['top']+e['height']<=1+1e-6 and min(e['width'],e['height'])>=3/96-1e-6

def test_all_parts_can_turn_up():
    seen = {b.part for style in CLASSES for seed in range(60) for b in draw_church(style, seed, every=True)[1]}
    assert seen==set(ONTOLOGY)

@pytest.mark.parametrize('style', CLASSES)
@pytest.mark.parametrize('size', (64,96,224))
def test_two_to_seven_boxes_at_any_size(style, size):
    for seed in range(12):
        image,boxes = draw_church(style, seed, size)
        assert image.size==(size,size) and 2<=len(boxes)<=7 and all(isinstance(b, PartBox) for b in boxes)

@pytest.mark.parametrize('style', CLASSES)
def test_boxes_hold_the_pixels_of_their_part(style):
    "One part in magenta: what changes lies in its box, and mostly fills it; something of each part is visible."
    plain,loud,size = Pen.draw,{m: (999,-999,999) for m in plan_church(style, np.random.default_rng(0))['palette']},96
    def photograph(k=None):
        def draw(pen, name, *where, **how):
            palette,pen.palette = pen.palette,(loud if len(pen.parts)==k and name in ONTOLOGY else pen.palette)
            plain(pen, name, *where, **how); pen.palette = palette
        with patch.object(Pen, 'draw', draw), patch.object(synthetic, '_develop', lambda image, rng: image):
            image,boxes = synthetic._photograph(plan_church(style, np.random.default_rng(seed)), np.random.default_rng(seed), size, passers=False)
        return np.asarray(image).astype(int),boxes
    slack = []
    for seed in (11,12):
        empty,boxes = photograph()
        for k,b in boxes.items():
            ys,xs = np.nonzero((photograph(k)[0]!=empty).any(2))
            assert len(ys), f"{b.part} is boxed but not visible"
            slack.append((xs.min()-b.left*size, ys.min()-b.top*size, (b.left+b.width)*size-xs.max()-1, (b.top+b.height)*size-ys.max()-1))
    assert np.min(slack)>-1 and np.mean(np.max(slack, 1)<1)>.85

def test_what_is_covered_is_not_boxed():
    "A wall drawn in front of everything leaves no box."
    for style in CLASSES:
        plan = plan_church(style, np.random.default_rng(4))
        with patch.object(synthetic, '_passers', lambda pen, rng, y: pen.draw('masonry', -1, -1, 3, 3)):
            assert synthetic._photograph(plan, np.random.default_rng(4), 96)[1]=={}

def test_errors(tmp_path):
    with pytest.raises(ValueError, match='Rococo.*Romanesque, Gothic, Renaissance, Baroque'): draw_church('Rococo', 0)
    with pytest.raises(ValueError, match='below 64'): draw_church('Gothic', 0, size=63)
    with pytest.raises(ValueError, match='no part is called'): draw_part('Pointed Window')
    with pytest.raises(ValueError, match='n_annotated'): make_churches(tmp_path/'a', n=5, n_annotated=6)
    with pytest.raises(ValueError, match='at least one'): make_churches(tmp_path/'a', n=0, n_annotated=0)
    with pytest.raises(ValueError, match='below 64'): make_churches(tmp_path/'a', n=5, n_annotated=1, size=10)
    assert not (tmp_path/'a').exists()
    (tmp_path/'b').mkdir(); (tmp_path/'b'/'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='not an empty folder'): make_churches(tmp_path/'b', n=5, n_annotated=1)
    with pytest.raises(FileExistsError, match='not an empty folder'): make_churches(tmp_path/'b'/'notes.txt', n=5, n_annotated=1)
    assert [p.name for p in (tmp_path/'b').iterdir()]==['notes.txt']

def test_as_many_annotated_as_photographs(tmp_path):
    assert len(annotations(make_churches(tmp_path/'a', n=6, n_annotated=6))['annotations'])==6

@pytest.mark.parametrize('name', [o for o in DRAWN if o not in ('none','masonry','house','person','tree')])
def test_every_part_draws_into_its_rectangle(name):
    x = np.asarray(draw_part(name, 80, 1.))
    changed = (x!=x[0,0]).any(2)
    assert changed.any() and not changed[:6].any() and not changed[:,:6].any() and not changed[-6:].any() and not changed[:,-6:].any()
