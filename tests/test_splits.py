"Labels, hierarchy, splits by church, copies of photographs, and the arithmetic of the real lists."
import itertools, json, shutil, zlib
from dataclasses import replace
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageEnhance
from ssl_wikichurches.data.archive import serve_record
from ssl_wikichurches.data.census import EXPECTED, census, part_counts, part_graph
from ssl_wikichurches.data.churches import STYLES, church_id, read_churches
from ssl_wikichurches.data.download import choose_images, download_churches, load_churches
from ssl_wikichurches.data.splits import (NEAR, Split, check_split, class_labels, image_hashes, label_counts, label_or_reason, load_split, make_split,
                                     near_duplicates, read_hierarchy, read_wc4, refuse_duplicates, rolled_up, save_split, study_split)
ROMANESQUE,GOTHIC,RENAISSANCE,BAROQUE = STYLES

def edit(folder, name, change):
    d = json.loads((folder/name).read_text()); change(d); (folder/name).write_text(json.dumps(d))

def write_lists(folder, y, part_of, ids=tuple(STYLES)):
    (folder/'labels').mkdir(exist_ok=True)
    for part in ('train','val','test'):
        lines = [f'{n} {ids[c]}' for n,c in y.items() if part_of(n)==part]
        (folder/'labels'/f'wc4_{part}.txt').write_text('\n'.join(lines))

def by_hash(name): return ('train','train','val','test')[zlib.crc32(church_id(name).encode())%4]

# ---- labels

def test_leaf_takes_exactly_one_of_the_four(folder):
    churches = read_churches(folder); free = [n for n in churches.images.index if not churches.images.annotated[n]][:2]
    ids = [churches.images.church[n] for n in free]
    edit(folder, 'churches.json', lambda d: (d[ids[0]].update(styles=[ROMANESQUE,GOTHIC]), d[ids[1]].update(styles=[])))
    churches = read_churches(folder)
    assert not set(free)&set(class_labels(churches).index)
    assert label_or_reason(churches)[free].tolist()==['several styles','no style']

def test_an_annotated_image_counts_as_its_first_tag(folder):
    name = next(iter(json.loads((folder/'building_parts.json').read_text())['annotations']))
    edit(folder, 'building_parts.json', lambda d: d['annotations'][name].update(styles=[BAROQUE,GOTHIC]))
    edit(folder, 'churches.json', lambda d: d[church_id(name)].update(styles=[]))
    assert class_labels(read_churches(folder))[name]==3

def test_official_lists_are_respected(folder):
    churches = read_churches(folder)
    y,held = class_labels(churches),set(churches.images.church[churches.images.annotated])
    write_lists(folder, y, by_hash)
    split = make_split(churches, 'wc4')
    assert split.test and split.val and set(split.eval)==set(churches.images.index[churches.images.annotated])
    for part in ('train','val','test'):
        names = getattr(split, part)
        assert set(names)=={n for n in y.index if by_hash(n)==part and church_id(n) not in held}
    assert make_split(churches, 'wc4', seed=7)==replace(split, seed=7) # nothing is drawn
    with pytest.raises(ValueError, match='brings its own'): make_split(churches, 'wc4', val=.2)
    counts = label_counts(churches, split)
    assert counts['all'].sum()==len(churches.images) and counts['test'].sum()==len(split.test)

@pytest.mark.parametrize('line,said', [('Q1_wd0.jpg Q99999','wc4_val.txt'), ('Q1_wd0.jpg','wc4_val.txt'), ('../Q1.jpg Q46261','path')])
def test_bad_lines_of_a_list(folder, line, said):
    write_lists(folder, class_labels(read_churches(folder)), by_hash)
    (folder/'labels/wc4_val.txt').write_text(line)
    with pytest.raises(ValueError, match=said): read_wc4(folder)

def test_lists_that_share_a_church_or_repeat_a_photograph(folder):
    y = class_labels(read_churches(folder)); write_lists(folder, y, by_hash)
    first = (folder/'labels/wc4_train.txt').read_text().splitlines()[0]
    with (folder/'labels/wc4_test.txt').open('a') as f: f.write('\n'+first)
    with pytest.raises(ValueError, match='listed twice'): read_wc4(folder)
    write_lists(folder, y, by_hash)
    with (folder/'labels/wc4_test.txt').open('a') as f: f.write('\n'+first.replace('_wd0','_wd7'))
    with pytest.raises(ValueError, match='in two lists'): read_wc4(folder)

# ---- hierarchy

def hierarchy(folder, pairs, names=()):
    (folder/'parent_child_rel.txt').write_text('\n'.join(' '.join(p) for p in pairs))
    return read_hierarchy(folder, {**STYLES, **dict.fromkeys(names, 'a style')})

def test_varieties_are_rolled_up(folder):
    graph,problems = hierarchy(folder, [(GOTHIC,'Q1'),('Q1','Q2'),('Q9','Q3'),('Q9',GOTHIC),(GOTHIC,BAROQUE),(ROMANESQUE,'Q4'),(GOTHIC,'Q4')], ['Q1','Q2','Q3','Q4','Q9'])
    assert not problems
    assert [set(rolled_up(q, graph)) for q in ('Q2','Q3','Q4','Q9',BAROQUE,'Q77')]==[{GOTHIC}, set(), {ROMANESQUE,GOTHIC}, set(), {BAROQUE}, set()]

def test_circles_and_unknown_ids_are_reported(folder):
    graph,problems = hierarchy(folder, [('Q1','Q2'),('Q2','Q1'),(GOTHIC,'Q1'),(GOTHIC,'Q55')], ['Q1','Q2'])
    assert len(problems)==2 and 'Q55' in problems[0] and 'circle' in problems[1]
    assert set(rolled_up('Q2', graph))=={GOTHIC} # still an answer
    with pytest.warns(UserWarning, match='Q55'): class_labels(read_churches(with_style(folder, ['Q1','Q2'])), 'hierarchy')

def with_style(folder, ids):
    with (folder/'style_names.txt').open('a') as f: f.write(''.join(f'\n{q} Style {q}' for q in ids))
    return folder

def test_hierarchy_gives_a_class_where_leaf_gives_none(folder):
    churches = read_churches(folder); free = churches.images.index[~churches.images.annotated]
    name = free[0]
    with_style(folder, ['Q1']); (folder/'parent_child_rel.txt').write_text(f'{GOTHIC} Q1')
    edit(folder, 'churches.json', lambda d: d[church_id(name)].update(styles=['Q1']))
    churches = read_churches(folder)
    assert name not in class_labels(churches) and class_labels(churches, 'hierarchy')[name]==1
    assert class_labels(churches).equals(class_labels(churches, 'hierarchy').drop(name))
    edit(folder, 'churches.json', lambda d: d[church_id(name)].update(styles=['Q1',BAROQUE]))
    assert label_or_reason(read_churches(folder), 'hierarchy')[name]=='several styles'

def test_malformed_hierarchy(folder):
    (folder/'parent_child_rel.txt').write_text('Q1 Q2 Q3')
    with pytest.raises(ValueError, match='parent child'): read_hierarchy(folder, STYLES)
    (folder/'parent_child_rel.txt').unlink()
    with pytest.raises(FileNotFoundError, match='parent_child_rel.txt'): read_hierarchy(folder, STYLES)

def test_the_graph_of_parts_has_no_circle(folder):
    assert part_graph(read_churches(folder)).number_of_nodes()
    edit(folder, 'building_parts.json', lambda d: (d['meta'][0].update(parents=[1]), d['meta'][1].update(parents=[0])))
    with pytest.raises(ValueError, match='circle'): part_graph(read_churches(folder))

# ---- splits

def test_split_is_by_church_stratified_and_seeded():
    churches = load_churches('synthetic')
    split,y = make_split(churches, seed=3), class_labels(churches)
    assert make_split(churches, seed=3)==split and make_split(churches, seed=4).train!=split.train
    owner = churches.images.church
    groups = [set(owner[list(g)]) for g in (split.train, split.val, split.eval)]
    assert not groups[0]&groups[1] and not groups[0]&groups[2] and not groups[1]&groups[2]
    assert set(split.eval)==set(churches.images.index[churches.images.annotated])
    assert len(groups[1])/(len(groups[0])+len(groups[1]))==pytest.approx(.12, abs=.01)
    for c in range(4): # every style has its share in validation
        t,v = (sum(y[n]==c for n in g) for g in (split.train, split.val))
        assert v/(t+v)==pytest.approx(.12, abs=.05)

def test_churches_that_are_left_out_leave_with_all_their_photographs():
    churches = load_churches('synthetic'); split = make_split(churches)
    several = next(n for n in split.train if sum(church_id(m)==church_id(n) for m in split.train)>1)
    without = make_split(churches, left_out=(several,))
    assert church_id(several) not in {church_id(n) for n in without.train+without.val} and without.left_out==(several,)
    assert without.key!=split.key

def test_split_roundtrip_leak_and_tampering(tmp_path, drawn):
    churches,file = read_churches(drawn),tmp_path/'s.json'; split = make_split(churches, val=.3)
    assert load_split(save_split(split, file), churches)==load_split(file)==split
    together = churches.images.church.replace(churches.images.church[split.train[0]], churches.images.church[split.eval[0]])
    same = replace(churches, images=churches.images.assign(church=together)) # the table says what a group is, not the names
    with pytest.raises(ValueError, match="leaks: 1 churches are in 'train' and in 'eval'"): check_split(split, same)
    with pytest.raises(ValueError, match='leaks'): load_split(save_split(split, file), same)
    with pytest.raises(ValueError, match='leaks'): check_split(replace(split, test=(split.train[0],)), churches)
    four = replace(split, val=split.val[1:], test=split.val[:1])
    for a,b in itertools.combinations(four.parts, 2): # whichever two parts share a church
        with pytest.raises(ValueError, match=f"leaks: 1 churches are in '{a}' and in '{b}'"): check_split(replace(four, **{b:(*getattr(four, b),getattr(four, a)[0])}), churches)
    with pytest.raises(ValueError, match='1 images are not in'): check_split(replace(split, train=split.train+('Q1_wd0.jpg',)), churches)
    d = json.loads(save_split(split, file).read_text())
    for change,said in ((dict(train=d['train']+[d['val'][0]]),'leaks'), (dict(train=d['train'][1:]),'changed after'), (dict(seed=5),'changed after'), (dict(more=1),'not a split')):
        file.write_text(json.dumps(d|change))
        with pytest.raises(ValueError, match=said): load_split(file, churches)
    with pytest.raises(ValueError, match='not a split'): load_split(file)
    file.write_text('[]')
    with pytest.raises(ValueError, match='not a split'): load_split(file)

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(.05, .5))
def test_no_church_is_in_two_parts_whatever_the_draw(seed, val):
    churches = load_churches('synthetic', verify=False)
    split = make_split(churches, val=val, seed=seed)
    owners = [{church_id(n) for n in names} for names in split.parts.values()]
    assert sum(map(len, owners))==len(set.union(*owners))

# ---- copies

def plant(folder, change, quality=70):
    "A copy of an evaluation image under the name of a church that may be trained on."
    churches = read_churches(folder); split = make_split(churches, val=.3)
    image = Image.open(churches.path(split.eval[0])).convert('RGB')
    change(image.resize((256,256))).save(churches.path(split.train[0]), 'JPEG', quality=quality)
    return split.train[0],split.eval[0]

@pytest.mark.parametrize('change', [lambda im: im, lambda im: im.resize((60,50)), lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    lambda im: ImageEnhance.Brightness(im).enhance(1.2), lambda im: im.convert('L'), lambda im: im.crop((3,3,253,253))],
    ids=['as it is','smaller','mirrored','brighter','gray','cropped'])
def test_a_copy_is_found_and_its_church_left_out(folder, change):
    copy,original = plant(folder, change)
    churches = read_churches(folder)
    split,pairs = study_split(churches, val=.3)
    assert pairs[['image','copy_of']].to_numpy().tolist()==[[copy,original]] and split.left_out==(copy,) and copy not in split.train+split.val
    with pytest.raises(ValueError, match=f'{copy} and {original}'): refuse_duplicates(churches, make_split(churches, val=.3))
    assert refuse_duplicates(churches, split) is split

def test_photographs_of_one_church_are_no_copies(folder):
    churches = read_churches(folder); name = churches.images.index[0]
    (folder/'images'/name.replace('_wd0','_wd9')).write_bytes(churches.path(name).read_bytes())
    churches = read_churches(folder)
    assert near_duplicates(churches, [*churches.images.index], [*churches.images.index]).empty

def test_limit_is_counted_in_bits(drawn):
    churches = read_churches(drawn); names = [*churches.images.index[:8]]
    hashes = image_hashes(churches, names)
    assert hashes.shape==(8,256) and hashes.dtype==bool
    everything = near_duplicates(churches, names[:1], names[1:], limit=256)
    plain = (hashes[0]!=hashes[1:]).sum(1)
    assert len(everything)==7 and (everything.set_index('copy_of').bits[names[1:]].to_numpy()<=plain).all() and (everything.bits>NEAR).all()

def test_copies_among_real_photographs(real):
    "Some of these photographs are filed under two buildings; the picture says so."
    churches = load_churches(real/'photos', verify=False)
    split,pairs = study_split(churches)
    names = [n for n in churches.images.index if not churches.images.annotated[n]]
    found = near_duplicates(churches, names, names)
    assert len(found)>=40 and (found.bits==0).sum()>=20 # each pair is found from both sides
    assert {frozenset(p) for p in found[['image','copy_of']].to_numpy().tolist()}>={frozenset(('Q970000176_wd0.jpg','Q970000178_wd0.jpg'))}
    assert set(split.left_out)==set(pairs.image) and near_duplicates(churches, [*split.train,*split.val], split.eval).empty

# ---- other classes than the four

COUNTRIES = {f'Q98{k}':f'Land {k}' for k in range(5)}

def with_countries(folder):
    "The folder as one of five classes that are no styles: each church has one, and no annotated image is tagged with anything else."
    edit(folder, 'churches.json', lambda d: [c.update(styles=[[*COUNTRIES][i%5]]) for i,c in enumerate(d.values())])
    edit(folder, 'building_parts.json', lambda d: [a.update(styles=[]) for a in d['annotations'].values()])
    names = '\n'.join(f'{q} {n}' for q,n in COUNTRIES.items())
    for file in ('style_names.txt','classes.txt'): (folder/file).write_text(names)
    return folder

def test_five_classes(folder):
    churches = read_churches(with_countries(folder))
    assert churches.class_names==tuple(COUNTRIES.values()) and churches.classes==COUNTRIES
    y = class_labels(churches)
    assert len(y)==len(churches.images) and set(y)=={0,1,2,3,4}
    assert all([*COUNTRIES][y[n]]==s[0] for n,s in churches.images.church_styles.items())
    assert class_labels(churches, 'hierarchy').equals(y)
    split = make_split(churches, val=.3, seed=1)
    for part in ('train','val'): assert {*y[list(getattr(split, part))]}=={0,1,2,3,4}
    assert {*split.eval}=={*churches.images.index[churches.images.annotated]} and check_split(split, churches) is split
    counts = label_counts(churches, split)
    assert [*counts.index]==[*COUNTRIES.values()] and counts['all'].sum()==len(churches.images)
    write_lists(folder, y, by_hash, [*COUNTRIES])
    assert class_labels(churches, 'wc4').equals(y) and make_split(churches, 'wc4').test
    table = census(churches)
    assert table.found['leaf: Land 4']==counts.loc['Land 4',['train','val']].sum() and table.found['leaf: Gothic'] is pd.NA
    assert table.index[-1]=='leaf: Land 4' and table.expected['leaf: Land 4'] is pd.NA
    assert {*part_counts(churches)['style']}<={*COUNTRIES.values()}
    assert len(choose_images(folder, 'leaf', [*churches.images.index]))==len(churches.images)

def test_three_of_the_four(folder):
    three = {q:STYLES[q] for q in (BAROQUE,ROMANESQUE,GOTHIC)}
    four = read_churches(folder); churches = read_churches(folder, classes=three)
    assert churches.class_names==('Baroque','Romanesque','Gothic')
    before,after = class_labels(four),class_labels(churches)
    assert after.equals(before[before!=2].map({3:0, 0:1, 1:2}))
    said = label_or_reason(churches)
    assert {*said[before.index[before==2]]}=={'another style'}
    split = make_split(churches, val=.3)
    assert not {*split.train,*split.val,*split.eval}&{*before.index[before==2]} and {*after[list(split.train)]}=={0,1,2}
    assert read_churches(folder).classes==STYLES

@pytest.mark.parametrize('text,said', [('Q1 One', '1 classes'), ('Q1 One\nQ2 One', 'one name'), ('Q1 One\nQ1 Two', 'classes.txt.*two lines'), ('Q1', 'classes.txt.*expected')])
def test_malformed_classes(folder, text, said):
    (folder/'classes.txt').write_text(text)
    with pytest.raises(ValueError, match=said): read_churches(folder)

def test_groups_are_those_of_the_table(folder):
    churches = read_churches(folder); names = [*churches.images.index[:6]]
    assert churches.groups(names)==[*churches.images.church[names]]
    one = replace(churches, images=churches.images.assign(church='Q7')) # a table that knows better than the names
    assert one.groups(names)==['Q7']*6 and one.groups([])==[]
    assert near_duplicates(churches, names[:1], names[:1]).empty and near_duplicates(one, names, names, limit=256).empty
    with pytest.raises(ValueError, match='nowhere.jpg'): churches.groups(['nowhere.jpg'])

# ---- the arithmetic of the real set

@pytest.fixture(scope='module')
def counted(tmp_path_factory):
    "Downloaded from archives with as many churches, photographs, tags, boxes and list entries as WikiChurches; photographs are one pixel."
    from wikichurches_counts import write_counted
    home = tmp_path_factory.mktemp('counted')
    made,record = write_counted(home/'made'),home/'record'
    for name in ('images','labels'): shutil.make_archive(record/name, 'zip', made, name)
    for p in made.glob('*.*'): shutil.copy(p, record)
    with serve_record(record) as base: table = download_churches(home/'set', 'all', base=base, progress=False)
    assert table.loc['photographs',['requested','fetched']].tolist()==[9485,9485]
    return home/'set'

def test_the_counts_of_wikichurches_are_reproduced(counted):
    churches = read_churches(counted, verify=False)
    table = census(churches)
    assert (table.found==table.expected).all(), table[table.difference!=0]
    assert len(class_labels(churches, 'wc4'))==7526 and len(class_labels(churches, 'hierarchy'))==7526
    names = [*churches.images.index]
    assert [len(choose_images(counted, s, names)) for s in ('annotated','leaf','wc4','all')]==[139,4727,7526,9485]
    held = set(churches.images.church[churches.images.annotated])
    for labels in ('leaf','wc4','hierarchy'):
        split = make_split(churches, labels)
        owners = {p:{church_id(n) for n in names} for p,names in split.parts.items()}
        assert owners['eval']==held and not held&(owners['train']|owners['val']|owners['test'])
    leaf = make_split(churches)
    assert len(leaf.train)+len(leaf.val)==EXPECTED['leaf: images of other churches']==4588 and len(leaf.val)==pytest.approx(.12*4588, abs=1)
    official = make_split(churches, 'wc4')
    assert len(official.train)+len(official.val)==5838+206-97 and len(official.test)==1482-42
