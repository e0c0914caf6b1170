"Semi-supervised fine-tuning: which photographs may be used, which labels count, and what must stay the supervised training."
from dataclasses import asdict, replace
from concurrent.futures import ThreadPoolExecutor
import json, math, shutil
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from scipy.special import logsumexp, softmax
from torch.nn import functional as F
from torchvision.transforms import v2
from timm_models import timm_model
from small import SIDE, load_backbone
from ssl_wikichurches.finetune import training as finetune
from ssl_wikichurches.finetune import semi_supervised
from ssl_wikichurches.finetune.attn_supervised import EndlessOrder
from ssl_wikichurches.data.churches import STYLES, ChurchDataset, church_id, read_churches, train_transform
from ssl_wikichurches.study.plan import Study
from ssl_wikichurches.study.runs import run_study
from ssl_wikichurches.finetune.training import StyleModel, make_recipe, new_classifier
from ssl_wikichurches.finetune.full import FullRecipe, fit_full, restore_full
from ssl_wikichurches.finetune.semi_supervised import (METHODS, LABEL_FILE, SelfTeacher, SemiSupervisedRecipe, UnlabelledTerm, best_of_class, check_pool, energy_limit, fit_semi_supervised,
                                              hide_labels, label_pool, label_quality, own_chance, pseudo_labels, read_pseudo_labels, recipe_views, strong_transform, teaching,
                                              unlabelled, unlabelled_loss, view_batches)
from ssl_wikichurches.data.splits import class_labels, load_split, make_split
from ssl_wikichurches.data.synthetic import DRAWN_STYLES, make_churches, read_hidden_styles

DRAWN_STYLES = [*STYLES.values()]

def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
def numbers(history): return history.drop(columns=['images_per_second','extra_loss'], errors='ignore')
TIMM = 'vit_base_patch16_dinov3'
def model(name): return timm_model(name) if name==TIMM else load_backbone(name)

@pytest.fixture(scope='module')
def few(data):
    "Labels of three tenths of the training churches; the hidden truth."
    churches = data.churches
    churches = replace(churches, images=churches.images.drop(drawn_without(data)[::2])) # thirty without a label are enough
    churches,split,truth = hide_labels(churches, data.split, .3)
    return replace(data, churches=churches, split=replace(split, val=split.val[::4])),truth

def drawn_without(data):
    "The photographs that the drawn set has without a label."
    return data.churches.images.index[data.churches.images.church.isin(read_hidden_styles(data.churches.root).index)]

# ---- the pool

def test_hidden_labels_are_gone_and_nothing_else(data, few):
    d,truth = few
    assert {*data.split.train}-{*d.split.train}=={*truth.index}&{*data.split.train} and not {*d.split.train}&{*truth.index}
    y,before = class_labels(d.churches),class_labels(data.churches)
    assert not {*truth.index}&{*y.index} and before.loc[truth.index].equals(truth.rename('label'))
    pd.testing.assert_series_equal(before.drop(truth.index), y)
    owner = d.churches.images.church
    assert {*truth.index}=={n for n in before.index if owner[n] in {*owner[truth.index]}} # all photographs of a church
    assert not {*owner[truth.index]}&{*owner[list(d.split.train)]}
    counts = [before.loc[list(s.train)].groupby(owner).first().value_counts().sort_index() for s in (data.split, d.split)]
    assert (counts[1]==(.3*counts[0]).round().clip(lower=1)).all()
    assert all(len(s)==0 for n in truth.index for s in d.churches.images.loc[n, ['styles','church_styles']])
    assert hide_labels(data.churches, data.split, .3)[2].equals(truth) and not hide_labels(data.churches, data.split, .3, seed=1)[2].index.equals(truth.index)
    c,s,t = hide_labels(data.churches, data.split, 1.)
    assert t.empty and s==data.split and c.images.equals(data.churches.images)
    for bad in (0., 1.1):
        with pytest.raises(ValueError, match='keep'): hide_labels(data.churches, data.split, bad)
    with pytest.raises(ValueError, match='official lists'): hide_labels(data.churches, replace(data.split, labels='wc4'), .5)

def with_pool(folder):
    "A drawn folder in which some churches lost their styles: churches, split, pool."
    churches = read_churches(folder)
    churches,split,truth = hide_labels(churches, make_split(churches, val=.2), .5)
    return churches,split,unlabelled(churches, split)

def test_the_pool_knows_no_held_out_church(few):
    d,truth = few
    pool,owner = unlabelled(d.churches, d.split),d.churches.images.church
    assert {*pool}=={*truth.index,*drawn_without(d)}
    s = d.split
    held = {*s.train,*s.val,*s.eval,*s.test}
    assert not {*pool}&held and not {church_id(n) for n in pool}&{church_id(n) for n in held}
    assert check_pool(pool, d.churches, s)==pool and check_pool((), d.churches, s)==()
    out = unlabelled(d.churches, replace(s, left_out=(pool[0],)))
    assert {*pool}-{*out}=={n for n in pool if owner[n]==owner[pool[0]]}

@pytest.mark.parametrize('leak', ('train','val','eval','annotated','sibling of eval','left out','test'))
def test_planted_leaks_are_refused(few, leak):
    d,_ = few
    pool,s,im = unlabelled(d.churches, d.split),d.split,d.churches.images
    if leak=='annotated': name = next(n for n in im.index[im.annotated] if n not in s.eval) # of no part of this split
    elif leak=='sibling of eval':
        churches = im.church[im.annotated]
        name = next(n for n in im.index[~im.annotated] if im.church[n] in {*churches})
    elif leak=='left out': s,name = replace(s, left_out=(pool[-1],)),pool[-1]
    elif leak=='test': s,name = replace(s, val=s.val[1:], test=s.val[:1]),s.val[0]
    else: name = getattr(s, leak)[0]
    planted = [n for n in pool if n!=name]+[name]
    with pytest.raises(ValueError, match='leak'): check_pool(planted, d.churches, s)
    with pytest.raises(ValueError, match='leak'): fit_semi_supervised(None, replace(d, split=s), SemiSupervisedRecipe(), pool=planted)

def test_labelled_unknown_and_repeated_photographs_are_refused(few):
    d,_ = few
    pool,y = unlabelled(d.churches, d.split),class_labels(d.churches)
    known = {*d.split.train,*d.split.val,*d.split.eval}
    owners = {church_id(n) for n in (*known,*d.churches.images.index[d.churches.images.annotated])}
    labelled = next(n for n in y.index if church_id(n) not in owners)
    for planted,what in (((*pool,labelled),'have a class'), ((*pool,pool[0]),'twice'), ((*pool,'Q1_wd0.jpg'),'not in')):
        with pytest.raises(ValueError, match=what): check_pool(planted, d.churches, d.split)

@pytest.mark.parametrize('part', ('eval','val'))
def test_copies_of_held_out_photographs_leave_with_their_church(folder, part):
    churches,split,pool = with_pool(folder)
    target = next(n for n in pool if sum(church_id(m)==church_id(n) for m in pool)==1)
    Image.open(churches.path(getattr(split, part)[0])).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(churches.path(target), quality=70)
    assert {*pool}-{*unlabelled(churches, split)}=={target}
    with pytest.raises(ValueError, match='copies'): check_pool(pool, churches, split)

def test_photographs_of_other_styles_are_in_the_pool(folder):
    "Another style, several styles, none: without a class, hence in the pool."
    styles = json.loads((folder/'churches.json').read_text())
    churches = read_churches(folder)
    free = [q for q in styles if q not in {*churches.images.church[churches.images.annotated]}]
    for q,s in zip(free, (['Q7'],['Q46261','Q176483'],[])): styles[q]['styles'] = s
    (folder/'churches.json').write_text(json.dumps(styles))
    (folder/'style_names.txt').write_text((folder/'style_names.txt').read_text()+'Q7 Eclectic\n')
    churches = read_churches(folder)
    pool = unlabelled(churches, make_split(churches, val=.2))
    assert {church_id(n) for n in pool}=={*free[:3]}

# ---- views

def test_the_weak_view_has_no_strong_operation(few, monkeypatch):
    d,_ = few
    names,recipes = list(unlabelled(d.churches, d.split)),{k:SemiSupervisedRecipe(kind=k) for k in METHODS}
    def bang(*a, **k): raise AssertionError('a strong operation')
    monkeypatch.setattr(v2.RandAugment, 'forward', bang)
    (x,),_ = next(iter(view_batches(d, names, recipe_views(d, recipes['pseudo']), 6, seed=4)))
    one = iter(EndlessOrder(len(names), 6, 4))
    plain = finetune.SeededPhotographs(ChurchDataset(d.churches, names, train_transform(SIDE)))
    assert torch.equal(x, torch.stack([plain[p]['image'] for p in next(one)]))
    weak,_ = recipe_views(d, recipes['fixmatch'])
    assert [type(t) for t in weak.transforms]==[type(t) for t in train_transform(SIDE).transforms]
    for k in ('fixmatch','self_training'):
        with pytest.raises(AssertionError, match='strong'): next(iter(view_batches(d, names, recipe_views(d, recipes[k]), 6)))

@pytest.mark.parametrize('geometry', ('squash','crop','letterbox'))
def test_strong_views_are_images(few, geometry):
    d,_ = few
    d = replace(d, geometry=geometry)
    names = list(unlabelled(d.churches, d.split))
    views,said = next(iter(view_batches(d, names, recipe_views(d, SemiSupervisedRecipe()), 12, seed=1)))
    assert views.shape==(2,12,3,SIDE,SIDE) and 0<=views.min() and views.max()<=1 and views.isfinite().all() and set(said)<=set(names)
    assert ((views[0]-views[1]).abs().flatten(1).mean(1)>.01).all() # each differs
    still = recipe_views(d, SemiSupervisedRecipe(augment=False))
    assert not any(isinstance(t, v2.RandomHorizontalFlip) for v in still for t in v.transforms)
    assert strong_transform(SIDE, geometry).side==train_transform(SIDE, geometry).side

def test_batches_are_a_function_of_seed_and_step(few):
    d,_ = few
    names,views = list(unlabelled(d.churches, d.split)),recipe_views(d, SemiSupervisedRecipe())
    here = torch.get_rng_state()
    first = [b for b,_ in zip(view_batches(d, names, views, 20, seed=2), range(6))]
    later = [b for b,_ in zip(view_batches(d, names, views, 20, seed=2, start=3), range(3))]
    assert torch.equal(torch.get_rng_state(), here)
    for (a,n),(b,m) in zip(first[3:], later): assert torch.equal(a, b) and n==m
    flat = [n for _,b in first for n in b]
    for r in range(len(flat)//len(names)): assert sorted(flat[r*len(names):(r+1)*len(names)])==sorted(names)
    assert not torch.equal(next(iter(view_batches(d, names, views, 20, seed=3)))[0], first[0][0])
    with pytest.raises(ValueError, match='evaluation'): view_batches(d, [*names,d.split.eval[0]], views, 4)

# ---- the gate

logits = st.integers(0, 10**6).map(lambda s: torch.randn(40, 4, generator=torch.Generator().manual_seed(s))*(1+s%7))

@settings(max_examples=40, deadline=None)
@given(z=logits, tau=st.floats(0, 1.2), limit=st.floats(-12, 3))
def test_gate_by_scipy(z, tau, limit):
    t = pseudo_labels(z, range(40), tau, limit)
    p,e = softmax(z.double().numpy(), 1),-logsumexp(z.double().numpy(), 1)
    np.testing.assert_allclose(t.probability, p.max(1), atol=1e-12); np.testing.assert_allclose(t.energy, e, atol=1e-12)
    assert list(t['style'])==[DRAWN_STYLES[i] for i in p.argmax(1)]
    clear = (abs(p.max(1)-tau)>1e-9)&(abs(e-limit)>1e-9)
    assert (t.accepted==((p.max(1)>=tau)&(e<=limit)))[clear].all() and (t.accepted==(t.why=='')).all()
    assert ((t.why=='unsure')==(p.max(1)<tau))[clear].all()

@settings(max_examples=40, deadline=None)
@given(z=logits, limit=st.floats(-12, 3))
def test_mask_rate_falls_in_tau_and_rises_in_the_limit(z, limit):
    rates = [pseudo_labels(z, range(40), tau, limit).accepted.mean() for tau in np.linspace(0, 1.1, 12)]
    assert all(0<=r<=1 for r in rates) and rates==sorted(rates, reverse=True) and rates[-1]==0
    rates = [pseudo_labels(z, range(40), .5, l).accepted.mean() for l in np.linspace(-20, 5, 12)]
    assert rates==sorted(rates) and pseudo_labels(z, range(40), 0).accepted.all()

@settings(max_examples=40, deadline=None)
@given(z=logits, order=st.permutations(range(4)), tau=st.floats(0, 1))
def test_permuted_classes_permute_pseudo_labels(z, order, tau):
    a,b = pseudo_labels(z, range(40), tau, -1.),pseudo_labels(z[:,order], range(40), tau, -1.)
    clear = (abs(a.probability-tau)>1e-9)&(abs(a.energy+1)>1e-9)
    assert [DRAWN_STYLES.index(s) for s in a['style']]==[order[DRAWN_STYLES.index(s)] for s in b['style']]
    assert (a.accepted==b.accepted)[clear].all()

@pytest.mark.parametrize('name', ('tiny-clip',TIMM))
def test_a_permuted_classifier_permutes_the_labels_of_a_pool(few, name):
    d,_ = few
    pool,b,order = unlabelled(d.churches, d.split),model(name),[2,0,3,1]
    layer,recipe = new_classifier(b.dim, 5),SemiSupervisedRecipe(kind='self_training', tau=0., per_class=4)
    with torch.no_grad(): layer.weight.mul_(50)
    other = new_classifier(b.dim)
    other.load_state_dict(dict(weight=layer.weight[order].detach(), bias=layer.bias[order].detach()))
    a,c = (label_pool(StyleModel(b, l), d, pool, recipe) for l in (layer, other))
    assert [DRAWN_STYLES.index(s) for s in a['style']]==[order[DRAWN_STYLES.index(s)] for s in c['style']] and a['style'].nunique()>1
    assert list(a.accepted)==list(c.accepted) and list(a['why'])==list(c['why']) and 0<a.accepted.sum()<len(a)

def test_the_limits_belong_to_what_is_accepted():
    "Four logits of 0: each class has the probability 1/4, and the energy is -log 4."
    even,energy = torch.zeros(1, 4),-torch.zeros(1, 4, dtype=torch.double).logsumexp(1).item()
    assert pseudo_labels(even, ['a'], .25, energy).accepted.all()
    assert pseudo_labels(even, ['a'], .2500001, energy)['why'].item()=='unsure' and pseudo_labels(even, ['a'], .25, energy-1e-9)['why'].item()=='unlike the labelled'

def test_a_teacher_that_is_not_finite_stops():
    with pytest.raises(FloatingPointError): pseudo_labels(torch.tensor([[0.,1,2,math.nan]]), ['a'])
    with pytest.raises(ValueError, match='2 names'): pseudo_labels(torch.zeros(1, 4), ['a','b'])

@settings(max_examples=40, deadline=None)
@given(z=logits, k=st.integers(0, 12), tau=st.floats(0, .9))
def test_best_of_class_by_hand(z, k, tau):
    t = pseudo_labels(z, [f'i{j:02d}' for j in range(40)], tau)
    want = set()
    for s in DRAWN_STYLES:
        rows = sorted(((-r.probability,r.image) for r in t.itertuples() if r.accepted and r.style==s))
        want |= {n for _,n in (rows[:k] if k else rows)}
    best = best_of_class(t, k)
    assert {*best.image[best.accepted]}==want and (best.accepted==(best.why=='')).all()
    pd.testing.assert_frame_equal(best.drop(columns=['accepted','why']), t.drop(columns=['accepted','why']))

def test_quality_by_hand():
    t = pseudo_labels(torch.eye(4)[[0,1,2,3,0]]*9, list('abcde'), .9)
    assert label_quality(t, pd.Series(dict(a=0, b=0, c=2)))==dict(decisions=5, accepted=1., precision=.4, outside=.4)
    none = label_quality(pseudo_labels(torch.zeros(2, 4), list('ab'), .9), pd.Series(dict(a=0)))
    assert none['accepted']==0 and math.isnan(none['precision']) and math.isnan(none['outside'])

@pytest.mark.parametrize('passing', (.05,.5,.9,.95))
def test_energy_limit(few, passing):
    d,_ = few
    b = load_backbone('tiny-clip')
    layer = new_classifier(b.dim)
    with torch.no_grad(): layer.weight.mul_(30)
    net = StyleModel(b, layer)
    x = torch.stack([d.loader('train').dataset[i]['image'] for i in range(len(d.split.train))])
    with torch.no_grad(): e = -logsumexp(net.eval()(x).double().numpy(), 1)
    limit = energy_limit(net, d.loader('train', 5), passing)
    assert limit==pytest.approx(np.quantile(e, passing, method='higher'), abs=1e-5)
    assert (e<=limit+1e-5).mean()>=passing and energy_limit(net, None, 1)==math.inf

# ---- the loss and its gradient

@settings(max_examples=25, deadline=None)
@given(z=logits, tau=st.floats(0, 1))
def test_loss_is_the_masked_mean_of_fixmatch(z, tau):
    strong = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    q = z.double().softmax(1)
    want = (F.cross_entropy(strong, q.argmax(1), reduction='none')*(q.max(1).values>=tau)).sum()/40
    use = torch.as_tensor(pseudo_labels(z, range(40), tau).accepted.to_numpy().copy())
    torch.testing.assert_close(unlabelled_loss(strong[use], q.argmax(1)[use], 40), want, atol=1e-6, rtol=1e-5)

def test_loss_refuses():
    with pytest.raises(ValueError, match='accepted of 1'): unlabelled_loss(torch.zeros(2, 4), torch.tensor([0,1]), 1)

@pytest.mark.parametrize('name', ('tiny-clip','tiny-siglip',TIMM))
@pytest.mark.parametrize('kind', ('pseudo','fixmatch'))
def test_the_teacher_has_no_gradient_and_leaves_no_trace(few, name, kind):
    "Gradients are those of fixed labels on the student's view; modes stay; every forward of the teacher is without a graph."
    d,_ = few
    pool,b = unlabelled(d.churches, d.split),model(name)
    net = StyleModel(b, new_classifier(b.dim, 3)).train()
    with torch.no_grad(): net.classifier.weight.mul_(40)
    list(net.backbone.layers)[0].eval() # a mode of its own
    modes,graph = [m.training for m in net.modules()],[]
    hook = net.register_forward_hook(lambda m, a, out: graph.append((out.requires_grad, m.training, len(out))))
    recipe = SemiSupervisedRecipe(kind=kind, tau=.4, passing=1., batch=16, weight_warmup=0., weight=2.)
    term = UnlabelledTerm(net, d, recipe, pool, SelfTeacher(net, d, recipe), seed=3)
    value = term(None, None, None, 0)['extra_loss'] # the batch of the classes has no part in it
    hook.remove()
    assert [m.training for m in net.modules()]==modes
    teacher,student = graph
    assert teacher==(False,False,16) and student[:2]==(True,True) and 0<student[2]<=16
    grads = {k:p.grad.clone() for k,p in net.named_parameters() if p.grad is not None}
    views,names = next(iter(view_batches(d, pool, recipe_views(d, recipe), 16, seed=3)))
    with torch.no_grad(), teaching(net): q = net(views[0]).softmax(1).max(1)
    net.zero_grad()
    ok = q.values>=.4
    assert 0<ok.sum()
    with own_chance(3, 0): z = net(views[-1][ok])
    loss = F.cross_entropy(z, q.indices[ok], reduction='sum')/16
    (2*loss).backward()
    assert value==pytest.approx(loss.item(), rel=1e-5) and grads.keys()=={k for k,p in net.named_parameters() if p.grad is not None}
    for k,p in net.named_parameters():
        if p.grad is not None: torch.testing.assert_close(grads[k], p.grad, atol=1e-6, rtol=1e-4)

def test_the_weight_is_lifted_by_weight(few):
    "The gradient of the term is linear in its weight, and rises over the warm-up."
    d,_ = few
    pool,b = unlabelled(d.churches, d.split),load_backbone('tiny-clip')
    net = StyleModel(b, new_classifier(b.dim, 3))
    def gradient(step, **more):
        net.zero_grad()
        recipe = SemiSupervisedRecipe(tau=0., passing=1., batch=6, **more)
        UnlabelledTerm(net, d, recipe, pool, SelfTeacher(net, d, recipe, per_epoch=10), seed=3, steps=10)(None, None, None, step)
        return net.classifier.weight.grad.clone()
    one = gradient(1, weight_warmup=0.)
    torch.testing.assert_close(gradient(1, weight_warmup=0., weight=3.), 3*one)
    torch.testing.assert_close(gradient(1, weight_warmup=.4), .5*one) # the second of four steps

def test_drawing_within_is_of_seed_and_step():
    torch.manual_seed(4); here = torch.get_rng_state()
    draws = {}
    for key in ((0,0),(0,1),(1,0)):
        with own_chance(*key): draws[key] = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), here) and len({tuple(v.tolist()) for v in draws.values()})==3
    with own_chance(0, 1): assert torch.equal(torch.rand(3), draws[0,1])

# ---- training

SHORT = dict(epochs=2, batch=12, lr=1e-2, backbone_lr=2e-4)
LOOSE = dict(SHORT, tau=.4, passing=1.)

@pytest.mark.parametrize('name', ('tiny-dinov3',TIMM)) # the first draws in training mode
@pytest.mark.parametrize('how', ('weight','empty',*METHODS))
def test_supervised_bit_for_bit(few, name, how):
    "Weight 0, an empty pool, and tau above 1 in the loop of each kind; blocks are skipped at random."
    d,_ = few
    short = dict(SHORT, drop_path=.2)
    pool = unlabelled(d.churches, d.split)
    full = fit_full(model(name), d, FullRecipe(**short), 3)
    recipe = SemiSupervisedRecipe(**short, **dict(weight=dict(weight=0.), empty={}).get(how, dict(kind=how, tau=1.01)))
    semi = fit_semi_supervised(model(name), d, recipe, 3, pool=() if how=='empty' else pool)
    assert same(full.state, semi.state) and same(full.other, semi.other)
    pd.testing.assert_frame_equal(numbers(full.history), numbers(semi.history), check_exact=True)
    assert len(semi.pseudo_labels)==0 if how in ('weight','empty') else (len(semi.pseudo_labels)>0 and not semi.pseudo_labels.accepted.any())
    if how in ('pseudo','fixmatch'): assert (semi.history.extra_loss==0).all()

def test_the_default_set_has_a_pool_and_hides_what_it_is(data, tmp_path):
    "Sixty photographs; a folder that cannot say what they are gives the same training."
    pool = unlabelled(data.churches, data.split)
    assert {*pool}=={*drawn_without(data)} and len(pool)==60 and not {*pool}&{*class_labels(data.churches, 'hierarchy').index}
    shutil.copytree(data.churches.root, root := tmp_path/'set')
    for n in ('hidden_styles.json','truth.parquet'): (root/n).unlink()
    blind,recipe = replace(data, churches=read_churches(root, verify=False)),SemiSupervisedRecipe(**dict(LOOSE, epochs=1))
    a,b = (fit_semi_supervised(load_backbone('tiny-clip'), o, recipe) for o in (data, blind))
    assert same(a.state, b.state) and a.pseudo_labels.accepted.any()
    pd.testing.assert_frame_equal(a.pseudo_labels, b.pseudo_labels, check_exact=True)

def test_a_study_trains_it_by_name(tmp_path):
    drawn = make_churches(tmp_path/'drawn', n=60, n_annotated=12, size=64, seed=1, unlabelled=12)
    study = Study('semi', data=str(drawn), models=('tiny-clip',), tiers=('full','semi_supervised'), size=64, val=.3, recipes=dict(full=dict(epochs=1, lr=1e-2, backbone_lr=2e-4), semi_supervised=dict(tau=.3, passing=1.)))
    with ThreadPoolExecutor(1) as pool: root = run_study(study, tmp_path, pool, device='cpu', progress=False)
    said = read_pseudo_labels(root/'tiny-clip-semi_supervised-seed0')
    churches = read_churches(drawn)
    assert {*said.image}=={*unlabelled(churches, load_split(root/'split.json'))} and said.accepted.any()
    a,b = (load_file(root/f'tiny-clip-{t}-seed0'/'model.safetensors') for t in ('full','semi_supervised'))
    assert a.keys()==b.keys() and not same(a, b)

@pytest.mark.parametrize('kind', METHODS)
def test_kinds_learn_restore_and_say_what_they_did(few, kind, tmp_path):
    d,truth = few
    recipe = SemiSupervisedRecipe(**LOOSE, kind=kind, mu=.5, **(dict(rounds=2, per_class=5) if kind=='self_training' else {}))
    f = fit_semi_supervised(load_backbone('tiny-clip'), d, recipe, 1, folder=tmp_path)
    x = next(iter(d.loader('eval', 8)))[0]
    with torch.no_grad(): assert torch.equal(restore_full(load_backbone('tiny-clip'), recipe, f.state)(x), f.backbone(x))
    t,pool = f.pseudo_labels,unlabelled(d.churches, d.split)
    pd.testing.assert_frame_equal(read_pseudo_labels(tmp_path), t, check_exact=True)
    held = {*d.split.train,*d.split.val,*d.split.eval,*d.split.test}
    assert {*t.image}<={*pool} and not {*t.image}&held and not {church_id(n) for n in t.image}&{church_id(n) for n in held}
    assert t.accepted.any() and t.probability.between(.25, 1).all() and {*t['why']}<={'','unsure','unlike the labelled','its class is full'}
    steps = SHORT['epochs']*math.ceil(len(d.split.train)/12)
    if kind=='self_training':
        assert t['round'].tolist()==[1]*len(pool)+[2]*len(pool) and t[t.accepted].groupby(['round','style']).size().max()<=5
        assert not [*tmp_path.rglob('round-*/checkpoint.safetensors')] and len([*tmp_path.rglob('history.csv')])==3
    else: assert t.step.value_counts().sort_index().to_dict()=={i:6 for i in range(steps)}
    assert not same(f.state, fit_full(load_backbone('tiny-clip'), d, FullRecipe(**SHORT), 1).state)
    if kind=='pseudo': assert same(f.state, fit_semi_supervised(load_backbone('tiny-clip'), d, recipe, 1).state)

@pytest.mark.parametrize('kind,dies', [('pseudo',3), ('fixmatch',3), ('self_training',7)]) # the last in the student's second epoch
def test_a_killed_training_ends_with_the_same_bits(few, kind, dies, tmp_path, monkeypatch):
    d,_ = few
    recipe = SemiSupervisedRecipe(**LOOSE, kind=kind, drop_path=.1)
    fit = lambda folder: fit_semi_supervised(load_backbone('tiny-dinov3'), d, recipe, 5, 'cpu', folder)
    whole = fit(None)
    class Killed(Exception): pass
    real,steps = finetune._gradients,iter(range(100))
    def step(*args):
        if next(steps)==dies: raise Killed
        return real(*args)
    with monkeypatch.context() as m:
        m.setattr(finetune, '_gradients', step)
        with pytest.raises(Killed): fit(tmp_path)
    for again in (fit(tmp_path), *([fit(tmp_path)] if kind=='fixmatch' else [])): # the second finds a training that has ended
        assert same(again.state, whole.state)
        pd.testing.assert_frame_equal(again.history.drop(columns='images_per_second'), whole.history.drop(columns='images_per_second'), check_exact=True)
        pd.testing.assert_frame_equal(again.pseudo_labels, whole.pseudo_labels, check_exact=True)
        pd.testing.assert_frame_equal(read_pseudo_labels(tmp_path), whole.pseudo_labels, check_exact=True)
    used = whole.pseudo_labels.image[whole.pseudo_labels.accepted].iloc[0]
    fewer = [n for n in unlabelled(d.churches, d.split) if n!=used]
    with pytest.raises(ValueError, match='another training'): fit_semi_supervised(load_backbone('tiny-dinov3'), d, recipe, 5, 'cpu', tmp_path, pool=fewer)

def test_a_checkpoint_without_its_labels_is_refused(few, tmp_path, monkeypatch):
    d,_ = few
    recipe = SemiSupervisedRecipe(**LOOSE)
    class Killed(Exception): pass
    real,steps = finetune._gradients,iter(range(100))
    def step(*args):
        if next(steps)==3: raise Killed
        return real(*args)
    with monkeypatch.context() as m:
        m.setattr(finetune, '_gradients', step)
        with pytest.raises(Killed): fit_semi_supervised(load_backbone('tiny-clip'), d, recipe, folder=tmp_path)
    (tmp_path/LABEL_FILE).unlink()
    with pytest.raises(FileNotFoundError): fit_semi_supervised(load_backbone('tiny-clip'), d, recipe, folder=tmp_path)

CHANGES = [('pseudo',dict(tau=.6)), ('pseudo',dict(weight=.5)), ('pseudo',dict(mu=.5)), ('pseudo',dict(weight_warmup=1.)), ('pseudo',dict(passing=.1)), ('pseudo',dict(augment=False)),
           ('fixmatch',dict(ops=1)), ('fixmatch',dict(magnitude=1)), ('fixmatch',dict(precision='bfloat16')), ('self_training',dict(rounds=2)), ('self_training',dict(per_class=1)),
           ('self_training',dict(magnitude=1)), ('self_training',dict(passing=.1))]
_plain = {}

@pytest.mark.parametrize('kind,change', CHANGES)
def test_every_field_acts(few, kind, change):
    d,_ = few
    epochs = 3 if kind=='pseudo' and 'passing' in change else 1 # the limit is read at the beginning of an epoch
    short = dict(LOOSE, epochs=epochs, weight_warmup=0.)
    fit = lambda **more: fit_semi_supervised(load_backbone('tiny-clip'), d, SemiSupervisedRecipe(**short|dict(kind=kind)|more), 2).state
    key = kind,short['epochs']
    if key not in _plain: _plain[key] = fit()
    assert not same(_plain[key], fit(**change))

def test_a_batch_in_parts_is_the_batch(few):
    d,_ = few
    a,b = (fit_semi_supervised(load_backbone('tiny-clip'), d, SemiSupervisedRecipe(**LOOSE, accumulate=n), 2) for n in (1,3))
    for k,v in a.state.items(): torch.testing.assert_close(v, b.state[k], atol=2e-4, rtol=1e-3)
    assert a.history.extra_loss.tolist()==pytest.approx(b.history.extra_loss.tolist(), rel=1e-3)

def test_students_start_where_the_teacher_did(few, monkeypatch):
    d,_ = few
    starts,real = [],semi_supervised.fit_full
    def spy(backbone, *args, **kw):
        starts.append({k:v.clone() for k,v in backbone.state_dict().items()})
        return real(backbone, *args, **kw)
    monkeypatch.setattr(semi_supervised, 'fit_full', spy)
    fit_semi_supervised(load_backbone('tiny-clip'), d, SemiSupervisedRecipe(**dict(LOOSE, epochs=1), kind='self_training', rounds=2))
    assert len(starts)==3 and all(same(s, load_backbone('tiny-clip').state_dict()) for s in starts)

def test_a_round_teaches_exactly_its_labels(few, monkeypatch):
    d,_ = few
    seen,real = [],semi_supervised.unlabelled_loss
    term = UnlabelledTerm.__call__
    names = []
    def spy(self, *args): names.append(self.names); return term(self, *args)
    monkeypatch.setattr(UnlabelledTerm, '__call__', spy)
    monkeypatch.setattr(semi_supervised, 'unlabelled_loss', lambda z, t, n: (seen.append(t.tolist()), real(z, t, n))[1])
    f = fit_semi_supervised(load_backbone('tiny-clip'), d, SemiSupervisedRecipe(**dict(LOOSE, epochs=1), kind='self_training', per_class=3), 4)
    good = f.pseudo_labels[f.pseudo_labels.accepted].set_index('image')['style'].map(DRAWN_STYLES.index)
    assert set(names)=={tuple(good.index)}
    order = iter(EndlessOrder(len(good), 12, 4))
    assert seen==[[int(good.iloc[i]) for i,_ in next(order)] for _ in seen] and len(seen)==math.ceil(len(d.split.train)/12)

def test_recipe_round_trips_and_refuses():
    r = SemiSupervisedRecipe(kind='self_training', rounds=3, per_class=0, mu=2.)
    assert SemiSupervisedRecipe(**json.loads(json.dumps(asdict(r))))==r and make_recipe(SemiSupervisedRecipe, mu=2, ops=3)==SemiSupervisedRecipe(mu=2., ops=3)
    for bad in (dict(kind='mean_teacher'), dict(weight=-1.), dict(weight_warmup=1.1), dict(tau=-.1), dict(passing=0.), dict(passing=1.1), dict(mu=0.), dict(kind='self_training', rounds=0),
                dict(kind='self_training', per_class=-1), dict(ops=0), dict(magnitude=31), dict(rounds=2), dict(per_class=3), dict(kind='pseudo', ops=3), dict(kind='pseudo', magnitude=2)):
        with pytest.raises(ValueError, match='|'.join(bad)): SemiSupervisedRecipe(**bad)

def test_several_processes_are_refused(few, monkeypatch):
    class Two:
        n = 2
    monkeypatch.setattr(semi_supervised, 'Team', Two)
    with pytest.raises(ValueError, match='one process'): fit_semi_supervised(load_backbone('tiny-clip'), few[0], SemiSupervisedRecipe())

def test_data_without_unlabelled_photographs_is_refused(data):
    bare = replace(data, churches=replace(data.churches, images=data.churches.images.drop(drawn_without(data))))
    assert unlabelled(bare.churches, bare.split)==()
    with pytest.raises(ValueError, match='no photograph without a label'): fit_semi_supervised(None, bare, SemiSupervisedRecipe())
