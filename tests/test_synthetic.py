"Synthetic churches: bytes by seed, a complete folder, the whole truth, planted evidence, errors."
import json, os, subprocess, sys
from collections import Counter
from unittest.mock import patch
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from ssl_wikichurches.data import download, synthetic
from ssl_wikichurches.data.churches import STYLES, read_churches
from ssl_wikichurches.data.download import EDITIONS, load_churches, synthetic_folder
from ssl_wikichurches.study.runs import data_key
from ssl_wikichurches.data.parts import DRAWN, ONTOLOGY, Pen, draw_part
from ssl_wikichurches.data.scene import make_tile, texture
from ssl_wikichurches.data.splits import class_labels, evaluation_split, make_split
from ssl_wikichurches.data.synthetic import (DRAWN_STYLES, ECLECTIC, SLOTS, decode_mask, draw_church, encode_mask, make_churches, option_odds, plan_church,
                                        read_hidden_styles, read_truth, representative)

def files(root): return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob('*') if p.is_file()}
def annotations(root): return json.loads((root/'building_parts.json').read_text())

@pytest.fixture(scope='module')
def default(): return synthetic_folder()

# ---- bytes

def test_same_arguments_same_bytes(tmp_path):
    a,b = (make_churches(tmp_path/o, n=14, n_annotated=5, seed=3) for o in 'ab')
    assert files(a)==files(b)

DIGEST = '''
import hashlib
from ssl_wikichurches.data.synthetic import DRAWN_STYLES, draw_church, encode_mask
h = hashlib.sha256()
for k in range(24):
    image,found = draw_church(DRAWN_STYLES[k%4], (8,k), 96)
    h.update(image.tobytes()); h.update(repr([(i.part, i.left, i.top, encode_mask(i.mask)) for i in found]).encode())
print(h.hexdigest())
'''
def digest(**env): return subprocess.run([sys.executable, '-c', DIGEST], env=os.environ|env, capture_output=True, text=True, check=True).stdout

def test_same_bytes_by_other_instructions_of_the_processor():
    "Without the wide vector instructions of this machine, and with another kernel for matrix products."
    old = dict(NPY_DISABLE_CPU_FEATURES='AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR X86_V3 X86_V4')
    assert digest()==digest(**old, OPENBLAS_CORETYPE='Nehalem')

def test_another_seed_is_another_set(tmp_path):
    a,b = (files(make_churches(tmp_path/str(seed), n=8, n_annotated=2, seed=seed)) for seed in (0,1))
    assert not {v for k,v in a.items() if k.endswith('jpg')} & {v for k,v in b.items() if k.endswith('jpg')}

def test_a_larger_set_begins_with_a_smaller_one(tmp_path):
    small,large = (make_churches(tmp_path/str(n), n=n, n_annotated=4) for n in (12,30))
    images = {k: v for k,v in files(small).items() if k.startswith('images/')}
    assert images.items() <= files(large).items() and annotations(small)==annotations(large)

def test_global_random_state_is_left_alone():
    np.random.seed(0); before = np.random.get_state()[1].copy()
    a = draw_church('Gothic', 1, 96)[0].tobytes()
    np.random.seed(5)
    assert draw_church('Gothic', 1, 96)[0].tobytes()==a
    np.random.seed(0); assert (np.random.get_state()[1]==before).all()

# ---- the folder

def test_layout_is_complete(default):
    assert sorted(p.name for p in default.iterdir())==['building_parts.json','churches.json','hidden_styles.json','images','parent_child_rel.txt','style_names.txt','truth.parquet']
    churches,names = json.loads((default/'churches.json').read_text()),[p.name for p in (default/'images').iterdir()]
    assert len(names)==480 and {o.split('_')[0] for o in names}==set(churches)
    assert all(k==v['id'] and set(v)=={'id','name','built_year','styles','country','location'} for k,v in churches.items())
    assert (default/'style_names.txt').read_text().splitlines()==[f'{k} {v}' for k,v in (STYLES|ECLECTIC).items()]
    for name in names[::40]:
        with Image.open(default/'images'/name) as image: assert image.size==(96,96) and image.mode=='RGB'

def test_the_reader_takes_it_without_problems(default):
    churches = read_churches(default)
    assert len(churches.problems)==0 and len(churches.images)==480 and churches.images.annotated.sum()==60

def test_imbalance_and_annotated_churches(default):
    churches = json.loads((default/'churches.json').read_text())
    named = [churches[p.name.split('_')[0]]['styles'] for p in (default/'images').iterdir()]
    counts = Counter(s[0] for s in named if s and s[0] in STYLES)
    assert sum(counts.values())==420 and named.count([])==40 and named.count([*ECLECTIC])==20
    assert set(counts)==set(STYLES) and min(counts.values())>=45 and max(counts.values())>2*min(counts.values())
    annotated = list(annotations(default)['annotations'])
    assert len(annotated)==60==len({o.split('_')[0] for o in annotated})

def test_country_says_nothing_about_style(default):
    rows = [(c['country']['name'], c['styles'][0]) for c in json.loads((default/'churches.json').read_text()).values() if {*c['styles']}&{*STYLES}]
    from scipy.stats import chi2_contingency
    table = pd.crosstab(pd.Series([r[0] for r in rows]), pd.Series([r[1] for r in rows]))
    assert table.shape==(3,4) and chi2_contingency(table).pvalue>.001

def test_some_churches_have_several_photographs(default):
    photos = Counter(p.name.split('_')[0] for p in (default/'images').iterdir())
    assert set(photos.values())=={1,2,3} and 430<=len(photos)<=460
    church = next(k for k,v in photos.items() if v>1)
    assert (default/'images'/f'{church}_wd0.jpg').read_bytes()!=(default/'images'/f'{church}_wd1.jpg').read_bytes()

def test_boxes_are_in_range_and_named_in_meta(default):
    data = annotations(default)
    meta = data['meta']
    assert {m['name'] for m in meta}>=set(ONTOLOGY) and len({m['name'] for m in meta})==len(meta)
    for k,m in enumerate(meta): assert all(0<=q<len(meta) and q!=k for q in m['parents'])
    for o in data['annotations'].values():
        elements = [e for g in o['bbox_groups'] for e in g['elements']]
        assert elements and all(e['label']==g['group_label'] for g in o['bbox_groups'] for e in g['elements'])
        for e in elements:
            assert 0<=e['label']<len(meta) and e['left']>=0 and e['top']>=0
            assert e['left']+e['width']<=1+1e-6 and e['top']+e['height']<=1+1e-6 and min(e['width'],e['height'])>=3/96-1e-6

def test_counts_of_the_full_edition():
    "Without drawing its 4,727 photographs: the records that it is drawn from."
    e = EDITIONS['synthetic-full']
    records = list(synthetic._records(e['n'], e['n_annotated'], e['seed'], synthetic._SHARES[e['imbalance']], e['several']))
    free = Counter(s[0] for _,s,annotated,_ in records if not annotated)
    assert len(records)==4727 and [free[k] for k in range(4)]==[1517,1520,171,1380] and sum(len(s)==2 for _,s,_,_ in records)==3

@pytest.mark.parametrize('n', [1,7,60,139,300])
def test_box_counts(n):
    rng = np.random.default_rng(n)
    tags,clear = synthetic._tags(n),rng.integers(2, 30, n)
    counts = synthetic._box_counts(tags, clear.tolist(), rng)
    assert sum(counts)==min(round(n*631/139), clear.sum()) and all(1<=c<=k for c,k in zip(counts, clear))

def test_editions(tmp_path, monkeypatch):
    assert synthetic_folder('synthetic-mixed', tmp_path, n=4, n_annotated=1).parent==tmp_path
    assert synthetic_folder(cache=tmp_path, n=4, n_annotated=1).name=='synthetic-v2-n4-n_annotated1-size96-seed0' # the folders of before
    drawn = []
    def few(folder, **how): # four churches in place of hundreds
        drawn.append(how)
        return make_churches(folder, **how|dict(n=4, n_annotated=1, size=64, unlabelled=0))
    monkeypatch.setenv('WIKICHURCHES_CACHE', str(tmp_path/'cache')); monkeypatch.setattr(download, 'make_churches', few)
    monkeypatch.setattr(download, '_whole_drawing', lambda folder, edition: folder.is_dir())
    names = {k:load_churches(k).root.name for k in EDITIONS}
    assert drawn==[*EDITIONS.values()] and len({*names.values()})==len(EDITIONS) and ['-unlabelled60' in n for n in names.values()]==['unlabelled' in e for e in EDITIONS.values()]

# ---- photographs without a label

def without(root, *names): return {k:v for k,v in files(root).items() if k not in names}
GROWS = ('churches.json','style_names.txt','truth.parquet','hidden_styles.json')

@pytest.mark.parametrize('evidence', ('parts','shortcut'))
def test_unlabelled_photographs_change_nothing_before_them(tmp_path, evidence):
    how = dict(n=18, n_annotated=5, size=64, seed=4, several=.3, evidence=evidence)
    a,b = make_churches(tmp_path/'a', **how),make_churches(tmp_path/'b', **how, unlabelled=11)
    before,after = without(a, *GROWS),without(b, *GROWS)
    new = {*after}-{*before}
    assert before.items()<=after.items() and len(new)==11 and all(k.startswith('images/') for k in new)
    assert min(new)>max(k for k in before if k.startswith('images/'))
    old,all_of = (json.loads((o/'churches.json').read_text()) for o in (a, b))
    assert [*all_of.items()][:len(old)]==[*old.items()]
    lines = [(o/'style_names.txt').read_text().splitlines() for o in (a, b)]
    assert lines==[[f'{k} {v}' for k,v in s.items()] for s in (STYLES, STYLES|ECLECTIC)] and not (a/'hidden_styles.json').exists()
    x,y = read_churches(a),read_churches(b)
    for labels in ('leaf','hierarchy'): assert class_labels(x, labels).equals(class_labels(y, labels)) and evaluation_split(x, labels)==evaluation_split(y, labels)
    one,other = read_truth(a),read_truth(b)
    pd.testing.assert_frame_equal(other.iloc[:len(one)], one, check_exact=True)
    assert files(make_churches(tmp_path/'c', **how, unlabelled=0))==files(a) and files(make_churches(tmp_path/'d', **how, unlabelled=11))==files(b)

def test_splits_and_keys_are_those_without_them(tmp_path, default):
    how = dict(n=48, n_annotated=10, size=64, seed=6)
    a,b = read_churches(make_churches(tmp_path/'a', **how)),read_churches(make_churches(tmp_path/'b', **how, unlabelled=9))
    assert len(b.images)-len(a.images)==9 and a.boxes.equals(b.boxes)
    for labels in ('leaf','hierarchy'):
        assert class_labels(a, labels).equals(class_labels(b, labels))
        for split in (make_split, evaluation_split): assert split(a, labels)==split(b, labels) and data_key(a, split(a, labels))==data_key(b, split(b, labels))
    default = read_churches(default)
    assert data_key(default, make_split(default))=='f70fdede5ee0cc47' # as before there were any

@pytest.mark.parametrize('n,first', [(36,12),(60,391)])
def test_nameless_and_eclectic_churches(tmp_path, default, n, first):
    root = make_churches(tmp_path/'a', n=12, n_annotated=0, size=64, several=0., unlabelled=n) if first==12 else default
    churches,hidden = json.loads((root/'churches.json').read_text()),read_hidden_styles(root)
    assert [*hidden.index]==[*churches][first:] and set(hidden.map(len))=={1,2} and all(len({*s})==len(s) and {*s}<={*DRAWN_STYLES} for s in hidden)
    for i,(q,s) in enumerate(hidden.items()):
        c = churches[q]
        assert c['styles']==([*ECLECTIC] if len(s)>1 else []) and (len(s)>1)==(i%3==2)
        assert c['built_year'] is None and not any(o in json.dumps(c) for o in (*DRAWN_STYLES,*STYLES)) # nothing tells
    single = hidden[hidden.map(len)==1].str[0].value_counts().reindex(DRAWN_STYLES)
    assert (abs(single/single.sum()-synthetic._SHARES['mild'])<.04).all()
    assert {*hidden[hidden.map(len)==2].str[0]}=={*DRAWN_STYLES} # each leads

def test_unlabelled_churches_are_drawn_from_their_hidden_styles(tmp_path):
    root = make_churches(tmp_path/'a', n=6, n_annotated=0, size=64, seed=2, evidence='shortcut', unlabelled=12)
    truth,hidden,own = read_truth(root),read_hidden_styles(root),[]
    for name,rows in truth[truth.slot=='cue'].groupby('image'):
        church = name.split('_')[0]
        if church in hidden: own.append((name,hidden[church]))
    assert len(own)>=4 and any(len(s)==2 for _,s in own) # those whose banner can be seen
    for name,styles in own:
        q,photo = name.removesuffix('.jpg').split('_wd')
        i = int(q[1:])-synthetic.FIRST_CHURCH
        image,_ = draw_church(styles, (2,i), 64, int(photo), 'shortcut')
        image.save(tmp_path/'again.jpg', **synthetic.JPEG)
        assert (tmp_path/'again.jpg').read_bytes()==(root/'images'/name).read_bytes()
        assert synthetic._cue(styles, np.random.default_rng([2,i,1,int(photo)]), 'shortcut', 1.)==DRAWN_STYLES.index(styles[0])

def test_hidden_styles_only_where_there_are_any(tmp_path):
    with pytest.raises(FileNotFoundError, match='without unlabelled photographs'): read_hidden_styles(make_churches(tmp_path/'a', n=4, n_annotated=0, size=64))

# ---- the whole truth

@settings(max_examples=60, deadline=None)
@given(st.integers(1,9), st.integers(0,2**31), st.sampled_from([0,.1,.5,1]))
def test_masks_survive_run_lengths(size, seed, share):
    mask = np.random.default_rng(seed).random((size,size))<share
    runs = encode_mask(mask)
    assert sum(runs)==size*size and all(r>0 for r in runs[1:]) and (decode_mask(runs)==mask).all()

def test_truth_agrees_with_photographs_and_boxes(default):
    truth,churches = read_truth(default),read_churches(default)
    assert set(truth.image)==set(churches.images.index) and not truth.duplicated(['image','part','slot','left','top','width','height']).any()
    for r in truth.iloc[::97].itertuples():
        mask = decode_mask(r.mask)
        ys,xs = np.nonzero(mask)
        assert mask.shape==(96,96) and r.area==pytest.approx(mask.mean())
        assert np.allclose((r.left*96, r.top*96, (r.left+r.width)*96, (r.top+r.height)*96), (xs.min(), ys.min(), xs.max()+1, ys.max()+1))
    assert truth.boxed.sum()==len(churches.boxes) and (truth[truth.boxed].clear).all() and set(truth[truth.clear].part)<=set(ONTOLOGY)
    assert (truth[truth.part==truth.part.str.lower()].evidence==0).all() # what cannot be boxed says nothing

def test_only_drawn_churches_know_the_truth(tmp_path):
    with pytest.raises(FileNotFoundError, match='only drawn churches'): read_truth(tmp_path)

def test_all_parts_can_turn_up():
    seen = set()
    for style,seed in ((s,k) for k in range(60) for s in DRAWN_STYLES):
        seen |= {i.part for i in draw_church(style, seed, 96)[1] if i.clear}
        if seen=={*ONTOLOGY}: return
    raise AssertionError(f'never drawn: {sorted({*ONTOLOGY}-seen)}')

@pytest.mark.parametrize('style', DRAWN_STYLES)
@pytest.mark.parametrize('size', (64,96,224))
def test_two_clear_parts_at_any_size(style, size):
    for seed in range(6):
        image,found = draw_church(style, seed, size)
        assert image.size==(size,size) and sum(i.clear for i in found)>=2 and all(i.mask.shape==(size,size) for i in found)

@pytest.mark.parametrize('style', DRAWN_STYLES)
def test_masks_are_the_pixels_of_their_part(style):
    "Each part once in white and once in black: the difference is the share of each pixel that it covers."
    plain,seed = Pen.draw,11
    def photograph(k=0, tone=0):
        flat = {m: (tone,)*3 for m in plan_church(style, np.random.default_rng(0))['palette']}
        def draw(pen, name, *where, inside=0):
            palette,pen.palette = pen.palette,(flat if k in (len(pen.elements)+1, inside) else pen.palette)
            number,pen.palette = plain(pen, name, *where, inside=inside),palette
            return number
        plan = dict(plan_church(style, np.random.default_rng(seed)), tiles={})
        with patch.object(Pen, 'draw', draw), patch.object(synthetic, 'develop', lambda image, rng: image), patch.object(synthetic, 'shadow', lambda *a: None):
            return synthetic._photograph(plan, np.random.default_rng(seed), 96, None, False)
    found = photograph()[1]
    assert len(found)>=8
    for k,i in found.items():
        white,black = (np.asarray(photograph(k, tone)[0])[...,0].astype(int) for tone in (999,-999))
        assert (i.mask==(white-black>=120)).all(), i.part

def test_what_is_covered_is_not_clear():
    "A wall drawn in front of everything leaves nothing to box."
    for style in DRAWN_STYLES:
        plan = plan_church(style, np.random.default_rng(4))
        with patch.object(synthetic, 'passers', lambda pen, rng, y: pen.draw('masonry', -1, -1, 3, 3)):
            assert synthetic._photograph(plan, np.random.default_rng(4), 96, None)[1]=={}

def test_representative_prefers_other_kinds():
    found = draw_church('Gothic', 64, 224)[1]
    clear = [i for i in found if i.clear]
    kinds = len({i.part for i in clear})
    for k in range(20):
        marked = representative(found, kinds, np.random.default_rng(k))
        assert len(marked)==kinds and len({i.part for i in marked})>kinds/2 and all(i.clear for i in marked)
    assert representative(found, 0, np.random.default_rng(0))==[]

# ---- what tells the style

def test_table_is_in_percent_and_plain_options_say_nothing():
    for slot,options in SLOTS.items():
        assert np.array([*options.values()]).sum(0).tolist()==[100]*4, slot
        for name,p in options.items():
            if name==name.lower(): assert len(set(p))==1, (slot, name)
            else: assert name in ONTOLOGY

@pytest.mark.parametrize('strength', [0.,.3,1.])
def test_odds_are_bayes(strength):
    for slot in SLOTS:
        all_p = np.array([option_odds(slot, (s,), strength)[0] for s in DRAWN_STYLES])
        assert np.allclose(all_p.sum(1), 1) and (strength>0 or np.allclose(all_p, all_p.mean(0)))
        for k,s in enumerate(DRAWN_STYLES):
            p,e = option_odds(slot, (s,), strength)
            assert np.allclose(np.exp(e)*all_p.mean(0), p)
    p,_ = option_odds('window', ('Romanesque','Gothic'))
    assert np.allclose(p, np.mean([option_odds('window', (s,))[0] for s in ('Romanesque','Gothic')], axis=0))

def test_same_seed_is_the_same_building_with_other_parts():
    shape = lambda style, k: {a: v for a,v in plan_church(style, np.random.default_rng(k)).items() if a in ('height','steep','tower','towers','masonry','depth','side')}
    for k in range(20): assert len({str(shape(s, k)) for s in DRAWN_STYLES})==1
    a,b = (plan_church(s, np.random.default_rng(3)) for s in ('Gothic','Baroque'))
    assert all((a['palette'][m]==b['palette'][m]).all() for m in a['palette'])

def test_parts_of_a_shortcut_world_say_nothing():
    for style in DRAWN_STYLES:
        found = draw_church(style, 5, 96, evidence='shortcut')[1]
        assert all(i.evidence==0 for i in found)
    assert any(i.evidence!=0 for i in draw_church('Gothic', 5, 96)[1])

def cues(evidence, strength, n=160):
    "Share of photographs whose banner has the color of the style."
    hits = []
    for k in range(n):
        rng = np.random.default_rng(k)
        hits.append(synthetic._cue((DRAWN_STYLES[k%4],), rng, evidence, strength)==k%4)
    return np.mean(hits)

@pytest.mark.parametrize('evidence,strength,expected', [('parts',1,.25), ('shortcut',1,1), ('mixed',1,1), ('shortcut',.5,.625), ('shortcut',0,.25), ('boxed',1,1),
                                                        ('boxed',.5,.625), ('none',1,.25)])
def test_banner_follows_the_style_as_often_as_it_should(evidence, strength, expected):
    assert cues(evidence, strength)==pytest.approx(expected, abs=.12)

@pytest.mark.parametrize('k', range(8))
def test_two_worlds_differ_in_nothing_but_where_the_color_is(k, monkeypatch):
    monkeypatch.setattr(synthetic, 'develop', lambda image, rng: image) # which sets the brightness of the whole picture
    (a,banner),(b,door),(c,bare) = (draw_church(DRAWN_STYLES[k%4], (3,k), 96, evidence=e, banner=not gone)
                                    for e,gone in (('shortcut',False), ('boxed',False), ('boxed',True)))
    cue,portal = (next(i for i in found if i.slot=='cue') for found in (banner,door))
    assert not cue.clear and portal.clear and portal.part=='Round Arch Portal'
    assert portal.mask.mean()==pytest.approx(cue.mask.mean(), rel=.35) # the banner has a pole, too
    a,b,c = (np.asarray(x).astype(int) for x in (a,b,c))
    grown = lambda m: np.pad(m, 1)[:-2,1:-1]|np.pad(m, 1)[2:,1:-1]|np.pad(m, 1)[1:-1,:-2]|np.pad(m, 1)[1:-1,2:]|m # pixels that a part covers by less than half
    assert not (abs(b-c).max(-1)>0)[~grown(grown(portal.mask))].any() and not (abs(a-c).max(-1)>0)[~grown(grown(cue.mask))].any()
    shade = lambda x, m: x[m].mean()
    assert shade(b, portal.mask)==pytest.approx(shade(a, cue.mask), rel=.3)

def test_in_a_world_without_evidence_a_style_changes_nothing():
    one,other = (draw_church(s, 11, 64, evidence='none')[0].tobytes() for s in ('Gothic','Baroque'))
    assert one==other
    with pytest.raises(ValueError, match='nothing to weaken'): draw_church('Gothic', 11, 64, evidence='none', strength=.5)

def test_a_painted_portal_is_boxed_in_every_photograph(tmp_path):
    root = make_churches(tmp_path/'a', n=24, n_annotated=24, size=64, seed=7, evidence='boxed', several=0.)
    cues = read_truth(root).query("slot=='cue'")
    assert len(cues)==24 and cues.boxed.all()

def test_without_the_banner_only_the_banner_is_gone():
    a,found = draw_church('Gothic', 9, 96, evidence='shortcut')
    b,rest = draw_church('Gothic', 9, 96, evidence='shortcut', banner=False)
    banner = next(i for i in found if i.slot=='cue')
    assert banner.part=='banner' and not any(i.slot=='cue' for i in rest) and not banner.clear
    apart = np.abs(np.asarray(a).astype(int)-np.asarray(b)).max(2)>40 # exposure follows the mean, which moves a little
    assert (apart&banner.mask).sum()>.5*banner.mask.sum() and (apart&~banner.mask).sum()<.5*banner.mask.sum()

# ---- textures and errors

def test_a_texture_keeps_brightness_and_owners():
    for kind in ('stone','brick','plaster','tiles'):
        tile = make_tile(kind, np.random.default_rng(0))
        assert tile.dtype==np.uint8 and tile.mean()==pytest.approx(128, rel=.12) and (tile==make_tile(kind, np.random.default_rng(0))).all()
    pen = Pen(64, dict(wall=(100,100,100)), dict(wall=tile))
    texture(pen, [(-3,-3),(-2,-3),(-2,-2)], 'wall') # outside the picture
    texture(pen, [(0,0),(1,0),(1,1)], 'roof') # no such tile
    assert (np.asarray(pen.image)==100).all()
    texture(pen, [(-1,-1),(2,-1),(2,2),(-1,2)], 'wall')
    assert not (np.asarray(pen.image)==100).all() and (np.asarray(pen.owner)==0).all()
    with pytest.raises(ValueError, match='plaster'): make_tile('marble', np.random.default_rng(0))

def test_errors(tmp_path):
    with pytest.raises(ValueError, match='Rococo.*Romanesque, Gothic, Renaissance, Baroque'): draw_church('Rococo', 0)
    with pytest.raises(ValueError, match='below 64'): draw_church('Gothic', 0, size=63)
    with pytest.raises(ValueError, match='evidence'): draw_church('Gothic', 0, evidence='sky')
    with pytest.raises(ValueError, match='strength'): draw_church('Gothic', 0, strength=1.5)
    with pytest.raises(ValueError, match='no part is called'): draw_part('Pointed Window')
    for match,bad in {'n_annotated':dict(n=5, n_annotated=6), 'at least one':dict(n=0, n_annotated=0), 'below 64':dict(n=5, n_annotated=1, size=10),
                      'evidence':dict(evidence='sky'), 'imbalance':dict(imbalance='none'), 'strength':dict(strength=-1), 'several':dict(several=1.), 'unlabelled':dict(unlabelled=-1)}.items():
        with pytest.raises(ValueError, match=match): make_churches(tmp_path/'a', **bad)
    assert not (tmp_path/'a').exists()
    (tmp_path/'b').mkdir(); (tmp_path/'b'/'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='not an empty folder'): make_churches(tmp_path/'b', n=5, n_annotated=1)
    with pytest.raises(FileExistsError, match='not an empty folder'): make_churches(tmp_path/'b'/'notes.txt', n=5, n_annotated=1)
    assert [p.name for p in (tmp_path/'b').iterdir()]==['notes.txt']

def test_as_many_annotated_as_photographs(tmp_path):
    assert len(annotations(make_churches(tmp_path/'a', n=6, n_annotated=6))['annotations'])==6

@pytest.mark.parametrize('name', [o for o in DRAWN if o not in ('none','masonry','house','person','tree','scaffold','banner')])
def test_every_part_draws_into_its_rectangle(name):
    x = np.asarray(draw_part(name, 80, 1.))
    changed = (x!=x[0,0]).any(2)
    assert changed.any() and not changed[:6].any() and not changed[:,:6].any() and not changed[-6:].any() and not changed[:,-6:].any()
