"Whatever lies in a folder: the reader returns consistent tables, or says which file and which entry it cannot understand."
import copy, json, shutil, tempfile
from contextlib import nullcontext
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from ssl_wikichurches.data.churches import BOX_COLUMNS, Churches, clip_boxes, read_church_styles, read_churches, read_parts, read_style_names

STYLES = {'Q46261':'Romanesque', 'Q176483':'Gothic', 'Q840829':'Baroque'}
FILES = ('churches.json', 'building_parts.json', 'style_names.txt')

def box(label=0, left=.1, top=.2, width=.3, height=.4): return dict(label=label, left=left, top=top, width=width, height=height)

def contents():
    "Three churches, two annotated images, as Python objects."
    churches = {q:dict(id=q, name=n, built_year=None, styles=[s], country=dict(id='Q183', name='Deutschland'), location=dict(lat=50.9, lon=6.9))
                for q,n,s in (('Q1','Dom','Q46261'), ('Q2','Žižkov 塔','Q176483'), ('Q3','San Zeno','Q840829'))}
    annotations = {'Q1_wd0.jpg':dict(styles=['Q46261'], bbox_groups=[dict(group_label=0, elements=[box(), box(1)])]),
                   'Q2_wd0.jpg':dict(styles=['Q176483'], bbox_groups=[dict(group_label=1, elements=[box(2, left=-.1)]), dict(group_label=2, elements=[])])}
    meta = [dict(name='Window', parents=[]), dict(name='Round Arch Window', parents=[0]), dict(name='Tracery', parents=[0,1])]
    return churches, dict(meta=meta, annotations=annotations)

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    for n in ('Q1_wd0','Q2_wd0','Q2_wd1','Q3_wd0'): Image.new('RGB', (8,6), (90,80,70)).save(folder/f'{n}.jpg')
    return folder

def write(root, images, churches, parts):
    shutil.copytree(images, root/'images')
    text = lambda d: d if isinstance(d, str) else json.dumps(d)
    (root/'churches.json').write_text(text(churches), encoding='utf-8')
    (root/'building_parts.json').write_text(text(parts), encoding='utf-8')
    (root/'style_names.txt').write_text('\n'.join(f'{q} {n}' for q,n in STYLES.items()), encoding='utf-8')
    return root

@pytest.fixture
def root(images, tmp_path): return write(tmp_path/'set', images, *contents())

def edit(root, name, change):
    d = json.loads((root/name).read_text()); change(d); (root/name).write_text(json.dumps(d))

def check(churches):
    "What later notebooks take for granted."
    images,boxes,parts = churches.images,churches.boxes,churches.parts
    assert isinstance(churches, Churches) and images.index.is_unique and boxes.columns.tolist()==BOX_COLUMNS
    assert set(boxes.image)<=set(images.index) and images.annotated.tolist()==images.index.isin(boxes.image).tolist()
    assert boxes.part_id.between(0, len(parts)-1).all() and (boxes.part.to_numpy()==parts.name.reindex(boxes.part_id).to_numpy()).all()
    place = boxes[['left','top','width','height']].to_numpy(float)
    assert np.isfinite(place).all() and (place[:,:2]>=0).all() and (place[:,2:]>0).all() and (place[:,:2]+place[:,2:]<=1+1e-9).all()
    for styles in (*images.styles, *images.church_styles): assert isinstance(styles, tuple) and set(styles)<=set(churches.style_names)
    assert all(churches.path(n).is_file() for n in images.index) and not set(churches.problems.image[churches.problems.problem=='missing'])&set(images.index)
    assert all(set(p)<=set(range(len(parts))) for p in parts.parents) and str(churches)

def read_or_refuse(root):
    "Tables, or an error that names one of the files; nothing else may come out."
    for on_error in ('raise','skip'):
        try: check(read_churches(root, on_error=on_error))
        except (ValueError, OSError) as e:
            assert type(e) in (ValueError, OSError, FileNotFoundError), repr(e)
            named = [*FILES, 'images', *(p.name for p in (root/'images').glob('*'))]
            assert any(n in str(e) for n in named) or 'photographs cannot be used' in str(e), repr(e)

def test_the_folder_as_it_should_be(root):
    churches = read_churches(root)
    check(churches)
    assert len(churches.images)==4 and churches.boxes.part.tolist()==['Window','Round Arch Window','Tracery'] and not len(churches.problems)
    assert churches.parts.parents.tolist()==[[],[0],[0,1]]

@pytest.mark.parametrize('missing', [('churches.json',), ('building_parts.json',), ('style_names.txt',), ('images',), FILES, ('images','churches.json')])
def test_missing_files(root, missing):
    for n in missing: shutil.rmtree(root/n) if n=='images' else (root/n).unlink()
    with pytest.raises(FileNotFoundError) as e: read_churches(root)
    assert any(n in str(e.value) for n in missing)

@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('data', [b'', b'{', b'\xff\xfe\x00', b'null', b'7', b'"text"', b'[[[]]]', b'['*100_000, b'{"a":'*5000, b'9'*5000, b'\xef\xbb\xbf{}'])
def test_other_content(root, name, data):
    (root/name).write_bytes(data)
    try: check(read_churches(root))
    except (ValueError, OSError) as e: assert name in str(e), e

@pytest.mark.parametrize('text,key', [('{"Q1": {"styles": []}, "Q1": {"styles": []}}', 'Q1'), ('{"Q1": {"styles": [], "styles": ["Q46261"]}}', 'styles')])
def test_a_key_twice(root, text, key):
    (root/'churches.json').write_text(text)
    with pytest.raises(ValueError, match=f"churches.json.*'{key}'"): read_churches(root)

def test_an_image_annotated_twice(root):
    a = json.dumps(dict(styles=[], bbox_groups=[]))
    (root/'building_parts.json').write_text('{"meta": [], "annotations": {"Q1_wd0.jpg": %s, "Q1_wd0.jpg": %s}}' % (a,a))
    with pytest.raises(ValueError, match='building_parts.json.*Q1_wd0.jpg'): read_churches(root)

def test_churches_as_a_list(root):
    before = read_churches(root)
    d = json.loads((root/'churches.json').read_text())
    (root/'churches.json').write_text(json.dumps([*d.values()]))
    pd.testing.assert_frame_equal(read_churches(root).images, before.images)
    for wrong,what in (([d['Q1'],d['Q1']], "'Q1'"), ([dict(name='x')], r'\[0\].id'), ([7], r'\[0\]'), ([d['Q1']|dict(id=None)], r'\[0\].id')):
        (root/'churches.json').write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=f'churches.json.*{what}'): read_churches(root)

@pytest.mark.parametrize('change', [lambda c: c.update(built_year=None, country=None, location=None), lambda c: [c.pop(k) for k in ('built_year','country','location','name','id')],
                                    lambda c: c.update(built_year=[1100,1200]), lambda c: c.update(styles=None), lambda c: c.pop('styles')])
def test_what_a_church_may_lack(root, change):
    edit(root, 'churches.json', lambda d: change(d['Q3']))
    check(read_churches(root))

@pytest.mark.parametrize('styles', ['Q46261', 7, {}, [7], [None], True])
def test_styles_of_another_type(root, styles):
    edit(root, 'churches.json', lambda d: d['Q3'].update(styles=styles))
    with pytest.raises(ValueError, match='churches.json: Q3.styles'): read_churches(root)

@pytest.mark.parametrize('text,what', [('Q46261', 'Q46261'), ('Q1 A\nQ1 B', 'Q1')])
def test_style_names(root, text, what):
    (root/'style_names.txt').write_text(text)
    with pytest.raises(ValueError, match=f'style_names.txt.*{what}'): read_style_names(root)
    (root/'style_names.txt').write_text('\ufeffQ1  Église  gothique\r\n\r\n', encoding='utf-8')
    assert read_style_names(root)=={'Q1':'Église  gothique'}

@pytest.mark.parametrize('change', [lambda a: a.update(bbox_groups=None), lambda a: a.pop('bbox_groups'), lambda a: a.update(bbox_groups=[]), lambda a: a['bbox_groups'][0].update(elements=[]),
                                    lambda a: a['bbox_groups'][0].pop('elements'), lambda a: a.update(styles=None), lambda a: a.pop('styles'), lambda a: a['bbox_groups'][0].pop('group_label')])
def test_what_an_annotation_may_lack(root, change):
    edit(root, 'building_parts.json', lambda d: change(d['annotations']['Q1_wd0.jpg']))
    churches = read_churches(root)
    check(churches)
    assert churches.images.styles['Q1_wd0.jpg']==('Q46261',)

@pytest.mark.parametrize('key', ['label','left','top','width','height'])
@pytest.mark.parametrize('value', ['.1', None, [], True, float('nan'), float('inf'), 10**400, -10**9, 'absent'])
def test_wrong_field_of_an_element(root, key, value):
    def change(d):
        e = d['annotations']['Q1_wd0.jpg']['bbox_groups'][0]['elements'][1]
        e.update({key:value}) if value!='absent' else e.pop(key)
    edit(root, 'building_parts.json', change)
    with pytest.raises(ValueError) as e: read_churches(root)
    assert all(s in str(e.value) for s in ('building_parts.json', 'Q1_wd0.jpg', 'elements[1]')) and len(str(e.value))<300

@pytest.mark.parametrize('change,what', [(lambda d: d.pop('meta'), 'meta'), (lambda d: d.pop('annotations'), 'annotations'), (lambda d: d.update(meta={}), 'meta'), (lambda d: d['meta'].append(None), r'meta\[3\]'),
                                         (lambda d: d['meta'][1].update(name=3), r'meta\[1\].name'), (lambda d: d['meta'][1].update(parents=[9]), r'meta\[1\].parents'),
                                         (lambda d: d['meta'][1].update(parents='0'), r'meta\[1\].parents'), (lambda d: d['annotations'].update({'Q1_wd0.jpg':[]}), 'Q1_wd0.jpg'),
                                         (lambda d: d['annotations']['Q1_wd0.jpg'].update(bbox_groups={}), 'bbox_groups'), (lambda d: d['annotations'].update({'../Q1_wd0.jpg':{}}), r'\.\./Q1'),
                                         (lambda d: d['annotations'].update({'Q1_\0.jpg':{}}), 'path'), (lambda d: d['annotations'].update({'':{}}), 'path'),
                                         (lambda d: d['annotations']['Q1_wd0.jpg']['bbox_groups'][0].update(group_label='x'), 'group_label'),
                                         (lambda d: d['annotations']['Q1_wd0.jpg']['bbox_groups'][0].update(group_label=2**63), 'group_label'),
                                         (lambda d: d['annotations']['Q1_wd0.jpg'].update(bbox_groups=[None]), r'bbox_groups\[0\]'),
                                         (lambda d: d['annotations']['Q1_wd0.jpg']['bbox_groups'][0].update(elements=7), 'elements')])
def test_wrong_parts_of_building_parts(root, change, what):
    edit(root, 'building_parts.json', change)
    with pytest.raises(ValueError, match=f'building_parts.json.*{what}'): read_churches(root)

def test_annotations_of_images_that_are_not_there(root):
    edit(root, 'building_parts.json', lambda d: d['annotations'].update({'Q3_wd9.jpg':dict(styles=[], bbox_groups=[dict(elements=[box()])])}))
    with pytest.raises(OSError, match='1 of 5.*Q3_wd9.jpg'): read_churches(root)
    churches = read_churches(root, on_error='skip')
    check(churches)
    assert churches.problems.image.tolist()==['Q3_wd9.jpg'] and 'Q3_wd9.jpg' not in churches.images.index

def test_annotated_photographs_alone_and_many_churches(root):
    "As on most machines: churches.json knows thousands, few photographs are there."
    for n in ('Q2_wd1.jpg','Q3_wd0.jpg'): (root/'images'/n).unlink()
    edit(root, 'churches.json', lambda d: d.update({f'Q{i}':dict(styles=['Q999']) for i in range(100,5000)}))
    churches = read_churches(root)
    check(churches)
    assert churches.images.index.tolist()==['Q1_wd0.jpg','Q2_wd0.jpg'] and len(read_church_styles(root))==4903

def test_names_of_every_script(root):
    name = 'Q3_wd7 Ōsaka 大阪 Ελλάδα é.jpg'
    shutil.copy(root/'images/Q3_wd0.jpg', root/'images'/name)
    edit(root, 'building_parts.json', lambda d: d['annotations'].update({name:dict(styles=['Q840829'], bbox_groups=[dict(group_label=0, elements=[box()])])}))
    churches = read_churches(root)
    check(churches)
    assert churches.images.annotated[name] and churches.images.church[name]=='Q3'

def test_nothing_at_all(root):
    for p in (root/'images').iterdir(): p.unlink()
    edit(root, 'building_parts.json', lambda d: d.update(annotations={}, meta=[]))
    check(read_churches(root))
    assert len(read_churches(root).images)==0

# ---- folders that chance has changed

junk = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=4), st.sampled_from(['Q1','Q46261','Q1_wd0.jpg','.5'])),
                    lambda x: st.lists(x, max_size=2)|st.dictionaries(st.sampled_from(['label','styles','elements','id','name','x']), x, max_size=2), max_leaves=4)
PLACES = (st.sampled_from(['churches','parts']), st.lists(st.integers(0, 5), min_size=0, max_size=7), junk, st.sampled_from(['set','delete','add']))

def mutate(tree, way, value, how):
    "Walk down by child numbers; change what is found there."
    parent = key = None
    for i in way:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
        if not keys: break
        parent,key = tree,keys[i%len(keys)]
        tree = tree[key]
    if how=='add' and isinstance(tree, list): tree.append(value)
    elif how=='add' and isinstance(tree, dict): tree[str(value)[:12]] = value
    elif parent is None: return value
    elif how=='delete': del parent[key]
    else: parent[key] = value

@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(changes=st.lists(st.tuples(*PLACES), min_size=1, max_size=3), gone=st.sets(st.sampled_from([*FILES,'Q1_wd0.jpg','Q2_wd0.jpg','Q3_wd0.jpg']), max_size=1))
def test_any_change_gives_tables_or_a_named_error(changes, gone, images):
    churches,parts = copy.deepcopy(contents())
    trees = dict(churches=churches, parts=parts)
    for which,way,value,how in changes:
        if (new := mutate(trees[which], way, copy.deepcopy(value), how)) is not None: trees[which] = new
    with tempfile.TemporaryDirectory() as tmp:
        root = write(Path(tmp)/'set', images, trees['churches'], trees['parts'])
        for n in gone: (root/n if n in FILES else root/'images'/n).unlink()
        read_or_refuse(root)

@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(*[st.floats(-1e6, 1e6)|st.integers(-2, 2)|st.floats(-1, 2)]*4), max_size=5))
def test_any_finite_box_is_clipped_listed_or_refused(rows, images):
    churches,parts = contents()
    parts['annotations'] = {'Q1_wd0.jpg':dict(bbox_groups=[dict(elements=[box(0, *r) for r in rows])])}
    near = all(-1<=v<=2 for l,t,w,h in rows for v in (l, t, l+w, t+h))
    with tempfile.TemporaryDirectory() as tmp, nullcontext() if near else pytest.raises(ValueError, match='Q1_wd0.jpg.*pixels'):
        found = read_churches(write(Path(tmp)/'set', images, churches, parts))
    if not near: return
    assert len(found.boxes)+len(found.problems)==len(rows)
    inside = clip_boxes(pd.DataFrame([*dict.fromkeys(rows)], columns=['left','top','width','height'], dtype=float))
    assert len(found.boxes)==((inside.width>0)&(inside.height>0)).sum()

@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), at=st.floats(0, 1), bytes_=st.binary(max_size=3), cut=st.booleans())
def test_any_damage_of_the_text(name, at, bytes_, cut, images):
    with tempfile.TemporaryDirectory() as tmp:
        root = write(Path(tmp)/'set', images, *contents())
        data = (root/name).read_bytes(); i = int(at*len(data))
        (root/name).write_bytes(data[:i]+bytes_+(b'' if cut else data[i+len(bytes_):]))
        read_or_refuse(root)
