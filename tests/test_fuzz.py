"""Folders, tables, archives and study files with anything in them: tables, a listed problem, or an error of one of two kinds that names a file; nothing is lost without a word.

A few examples are tried here; WIKICHURCHES_FUZZ=200 tries so many times as many."""
import csv, io, json, os, shutil, string, tarfile, tempfile, unicodedata, warnings, zipfile
from pathlib import Path, PurePosixPath
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from record_server import zipped
from test_inputs import QS, make_set
from ssl_wikichurches.attention.scores import read_boxes, read_maps, score_maps
from ssl_wikichurches.cli import compose_study, read_recipes
from ssl_wikichurches.data.churches import is_litter, read_churches
from ssl_wikichurches.data.codec import check_image, open_image
from ssl_wikichurches.data.download import read_manifest, unpack_labels, unpack_shard
from ssl_wikichurches.data.splits import Split, load_split, make_split, read_hierarchy, read_wc4, save_split
from ssl_wikichurches.stats.shift import pair_scores
from ssl_wikichurches.study.plan import Study, as_study, load_study

def some(n): return settings(max_examples=n*int(os.environ.get('WIKICHURCHES_FUZZ', 1)), deadline=None, suppress_health_check=[*HealthCheck])
EXPECTED = ValueError, OSError # what the commands turn into one line

def refused(call, *names):
    "The result of a call, or None where it was refused with one of the names."
    try:
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); return call()
    except EXPECTED as e:
        said = str(e)
        assert said.strip() and (not names or any(n in said for n in names)), f'{type(e).__name__} without a name: {said!r}'

# ---- changes of bytes and texts

edits = st.lists(st.tuples(st.sampled_from(['cut','drop','insert','flip','zero','twice','tail']), st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=3)
def edited(data, changes):
    for how,at,new in changes:
        i = int(at*len(data)); k = len(new)*(7 if how in ('drop','zero','twice') else 1)
        data = {'cut':data[:i], 'drop':data[:i]+data[i+k:], 'insert':data[:i]+new+data[i:], 'flip':data[:i]+bytes(a^b for a,b in zip(data[i:i+k], new))+data[i+k:],
                'zero':data[:i]+bytes(min(k, len(data)-i))+data[i+k:], 'twice':data[:i+k]+data[i:], 'tail':data+new}[how]
    return data

kinds = st.sampled_from(['utf-8','utf-8','utf-8','utf-8-sig','utf-16','utf-32','utf-16-be','cp1252'])

# ---- folders

@pytest.fixture(scope='module')
def basis(tmp_path_factory):
    root = make_set(tmp_path_factory.mktemp('fuzz')/'set', train=1, unlabelled=1)
    for i,how in enumerate((dict(format='PNG'), dict(format='TIFF'), dict(format='WEBP'), dict(format='GIF'), dict(format='JPEG', progressive=True))):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (24,30,3), dtype=np.uint8)).save(root/f'images/Q{i+1}_wd1.jpg', **how)
    return root

NAMES = [lambda n: n.upper(), lambda n: n.replace('.jpg','.jpeg'), lambda n: n.replace('_',' _'), lambda n: n.replace('.','.\u00e9.'), lambda n: 'more/'+n, lambda n: 'a/b/'+n, lambda n: n+':Zone.Identifier', lambda n: '._'+n,
         lambda n: unicodedata.normalize('NFD', n.replace('_','_\u00e9')), lambda n: n[1:], lambda n: 'Q77'+n, lambda n: n.replace('.jpg',''), lambda n: n.replace('_wd','\n_wd'), lambda n: 'Thumbs.db']
steps = st.lists(st.tuples(st.sampled_from(['delete','rename','bytes','link','copy','folder']), st.integers(0, 99), st.integers(0, len(NAMES)-1), edits), max_size=4)
texts = st.lists(st.tuples(st.sampled_from(['churches.json','building_parts.json','style_names.txt','classes.txt','parent_child_rel.txt']), edits, kinds), max_size=2)

def disturb(root, steps, texts):
    for what,k,name,changes in steps:
        files = sorted(p for p in (root/'images').rglob('*') if not p.is_dir())
        if not files: return
        p = files[k%len(files)]; new = root/'images'/NAMES[name](p.name)
        if what=='delete': p.unlink()
        elif what=='link': p.unlink(); p.symlink_to('nowhere/'+p.name)
        elif what=='folder': p.unlink(); p.mkdir()
        elif what=='bytes': p.is_symlink() or p.write_bytes(edited(p.read_bytes(), changes))
        elif not new.exists() and not p.is_symlink():
            new.parent.mkdir(parents=True, exist_ok=True); (os.rename if what=='rename' else shutil.copy)(p, new)
    for name,changes,kind in texts:
        text = (root/name).read_text() if (root/name).is_file() else '\n'.join(f'{q} K{q}' for q in QS[:2]) if name=='classes.txt' else f'{QS[0]} {QS[1]}\n'
        (root/name).write_bytes(edited(text.encode(kind, 'replace'), changes))

@some(12)
@given(steps=steps, texts=texts)
def test_a_folder_with_anything_in_it(steps, texts, basis):
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(shutil.copytree(basis, Path(tmp)/'set', symlinks=True))
        disturb(root, steps, texts)
        there = [p.relative_to(root/'images').as_posix() for p in (root/'images').rglob('*') if not p.is_dir()]
        there = [n for n in there if not is_litter(n)]
        for on_error in ('raise','skip'):
            churches = refused(lambda: read_churches(root, on_error), *(PurePosixPath(n).name for n in there), *(p.name for p in basis.rglob('*')), *(p.name for p in root.rglob('*')))
            if churches is None: continue
            known = {*churches.images.index, *churches.problems.image}
            here = {n for n in there if '/' not in n}
            lost = [n for n in there if n not in known and ('/' not in n or n.rpartition('/')[2][:1]=='Q' and '_' in n.rpartition('/')[2] and n.rpartition('/')[2] not in here)]
            assert not lost and (on_error=='skip' or not ({*churches.problems.image}-{*churches.images.index}))
            if not any(t[0]=='building_parts.json' for t in texts): assert {f'Q{k}_wd0.jpg' for k in (1,3,5,7)}<=known
            assert all(check_image(churches.path(n))=='' for n in churches.images.index)
            split = refused(lambda: make_split(churches, 'hierarchy' if texts else 'leaf'))
            if split: assert not churches.held_out&{*churches.groups([*split.train,*split.val])}
            refused(lambda: read_wc4(root), 'wc4')

@some(25)
@given(k=st.integers(0, 13), changes=edits)
def test_a_photograph_with_anything_in_it(k, changes, basis):
    "What is called whole is read by PIL to the same size; open_image agrees at every scale."
    source = sorted((basis/'images').iterdir())[k%14]
    with tempfile.TemporaryDirectory() as tmp:
        p = Path(tmp)/source.name; p.write_bytes(edited(source.read_bytes(), changes))
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); said = check_image(p)
        assert said=='' or source.name in said
        if said=='':
            for side in (None, 4, 64): assert refused(lambda: open_image(p, side), source.name).mode=='RGB'

# ---- tables

cells = st.text(string.ascii_letters+'0123456789.,;"\'- \n\u00e9', max_size=6)|st.sampled_from(['None','NA','nan','inf','1e400','-0','','1_0','\u0661','1,5'])
BOXES = 'image,left,top,right,bottom,part\na,1,2,30,40,Window\na,2.5,3,31,41,None\nb,1,2,30,40,Door\n'
MAPS = 'image,row,column,value\n'+''.join(f'{n},{r},{c},{r+.5*c}\n' for n in 'ab' for r in (0,1) for c in (0,1))
SCORES = 'image,church,value\n'+''.join(f'{k}.jpg,Q{k//2},{k/7}\n' for k in range(8))

def table(text, swaps, changes, kind):
    rows = [*csv.reader(io.StringIO(text))]
    for at,column,cell in swaps: rows[int(at*(len(rows)-1))][column%len(rows[0])] = cell
    csv.writer(out := io.StringIO(), lineterminator='\n').writerows(rows)
    return edited(out.getvalue().encode(kind, 'replace'), changes)
swaps = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), cells), max_size=3)

@some(60)
@given(swaps=swaps, changes=edits, kind=kinds)
def test_a_table_of_boxes_with_anything_in_it(swaps, changes, kind):
    with tempfile.TemporaryDirectory() as tmp:
        (p := Path(tmp)/'boxes.csv').write_bytes(table(BOXES, swaps, changes, kind))
        found = refused(lambda: read_boxes(p, ['a','b']), 'boxes.csv')
        if found is None: return
        boxes,parts = found
        assert all(b.isfinite().all() and (b[:,2:]>b[:,:2]).all() for b in boxes) and (parts is None or [*map(len, parts)]==[*map(len, boxes)])
        if not changes: # every row of the file is there
            rows = [*csv.reader(io.StringIO(p.read_bytes().decode({'cp1252':'utf-8','utf-16-be':'utf-16-be'}.get(kind, kind))))]
            assert [*map(len, boxes)]==[sum(r[0]==n for r in rows[1:]) for n in 'ab']
        refused(lambda: score_maps(torch.rand(2,2,2), boxes, ['a','b'], 64, parts=parts, only=['iou@90']))

@some(40)
@given(swaps=swaps, changes=edits, kind=kinds)
def test_a_table_of_maps_with_anything_in_it(swaps, changes, kind):
    with tempfile.TemporaryDirectory() as tmp:
        (p := Path(tmp)/'maps.csv').write_bytes(table(MAPS, swaps, changes, kind))
        found = refused(lambda: read_maps(p), 'maps.csv')
        if found: assert found[1].isfinite().all() and len(found[1])==len({*found[0]})

@some(30)
@given(swaps=swaps, changes=edits, kind=kinds)
def test_a_table_of_scores_with_anything_in_it(swaps, changes, kind):
    with tempfile.TemporaryDirectory() as tmp:
        (p := Path(tmp)/'scores.csv').write_bytes(table(SCORES, swaps, changes, kind))
        (whole := Path(tmp)/'whole.csv').write_text(SCORES)
        found = refused(lambda: pair_scores(whole, p), 'scores.csv', 'after', 'before', 'scores', 'church')
        assert found is None or len(found)==8 and np.isfinite(found.after).all()

# ---- archives

MEMBERS = {f'labels/{n}':bytes(np.random.default_rng(i).integers(0, 64, 400, dtype=np.uint8)) for i,n in enumerate(('wc4_train.txt','wc4_val.txt','deep/\u00e9.txt'))}

@some(60)
@given(how=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]), changes=edits)
def test_a_zip_archive_with_anything_in_it(how, changes):
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp)/'set').mkdir(); (p := Path(tmp)/'set/labels.zip').write_bytes(edited(zipped(MEMBERS, how), changes))
        found = refused(lambda: unpack_labels(p.parent), 'labels', 'the archive is refused', 'wc4')
        for path,f in (found or {}).items(): assert (p.parent/path).is_file()==(f['state']!='damaged') and f['state'] in ('fetched','damaged')
        assert {q.name for q in Path(tmp).iterdir()}=={'set'} and not [*p.parent.glob('*.part')]

@some(40)
@given(how=st.sampled_from(['w','w:gz','w:xz']), changes=edits, again=st.booleans())
def test_a_tar_file_with_anything_in_it(how, changes, again):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=how) as t:
        for n in ('Q1_wd0.jpg','masks/Q2_wd0.png','Q2_wd0.jpg',*['Q1_wd0.jpg']*again): m = tarfile.TarInfo(n); m.size = 700; t.addfile(m, io.BytesIO(n.encode()*70))
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp)/'set').mkdir(); (p := Path(tmp)/'s.tar').write_bytes(edited(out.getvalue(), changes))
        found = refused(lambda: unpack_shard(p, ['Q1_wd0.jpg','Q2_wd0.jpg'], Path(tmp)/'set'), 's.tar', 'the archive is refused', 'wd0', 'masks')
        for path in found or {}: assert (Path(tmp)/'set'/path).is_file()
        assert {q.name for q in Path(tmp).iterdir()}=={'set','s.tar'}

# ---- study files

plain = st.none()|st.booleans()|st.integers(-3, 10**20)|st.floats()|st.text(max_size=5)|st.sampled_from(['lora','full','linear','iou@90','a=b','../x'])
values = st.recursive(plain, lambda v: st.lists(v, max_size=3)|st.dictionaries(st.sampled_from(['lora','full','lr','epochs','metric','margin','models','x']), v, max_size=3), max_leaves=5)
FIELDS = [*Study.__dataclass_fields__]

@some(80)
@given(given=st.dictionaries(st.sampled_from([*FIELDS,'else']), values, max_size=4))
def test_a_study_with_anything_in_it(given):
    found = refused(lambda: as_study(given, 'mine.toml'))
    assert found is None or isinstance(found, Study)

TOML = 'name = "mine"\nmodels = ["tiny-clip"]\ntiers = ["lora","full"]\nseeds = [0, 1]\n[recipes.lora]\nepochs = 2\nlr = 1e-3\n[analysis]\nmargin = 0.02\nmetric = "iou@90"\n'

@some(60)
@given(changes=edits, kind=kinds, word=st.text(max_size=4), at=st.floats(0, 1))
def test_a_study_file_with_anything_in_it(changes, kind, word, at):
    with tempfile.TemporaryDirectory() as tmp:
        i = int(at*len(TOML))
        (p := Path(tmp)/'mine.toml').write_bytes(edited((TOML[:i]+word+TOML[i:]).encode(kind, 'replace'), changes))
        found = refused(lambda: load_study(p))
        assert found is None or isinstance(found, Study)

@some(60)
@given(text=st.text(string.ascii_lowercase+'.,=0123456789-[]{}"', max_size=20), flags=st.dictionaries(st.sampled_from(['models','tiers','seeds']), st.text(max_size=6), max_size=2))
def test_words_of_a_command_line(text, flags):
    refused(lambda: read_recipes(text)); refused(lambda: compose_study(recipe=text, **flags))

@some(40)
@given(changes=edits, kind=kinds)
def test_records_with_anything_in_them(changes, kind, basis):
    churches = read_churches(basis)
    with tempfile.TemporaryDirectory() as tmp:
        p = save_split(Split(('Q2_wd0.jpg',), ('Q4_wd0.jpg',), ('Q1_wd0.jpg',)), Path(tmp)/'split.json')
        p.write_bytes(edited(p.read_bytes().decode().encode(kind), changes))
        for c in (None, churches):
            found = refused(lambda: load_split(p, c))
            if found: assert (found.train,found.val,found.eval)==(('Q2_wd0.jpg',),('Q4_wd0.jpg',),('Q1_wd0.jpg',))
        (Path(tmp)/'download.json').write_bytes(edited(json.dumps(dict(record='1', base='b', selections=['all'], files={'images/a':dict(size=1)}, shards={})).encode(kind), changes))
        refused(lambda: read_manifest(tmp), 'download.json')
        (Path(tmp)/'parent_child_rel.txt').write_bytes(edited(f'{QS[0]} {QS[1]}\n'.encode(kind), changes))
        refused(lambda: read_hierarchy(tmp, dict.fromkeys(QS, '')), 'parent_child_rel.txt')
