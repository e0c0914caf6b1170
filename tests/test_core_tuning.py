"Core-tuning: losses against loops, hard pairs against brute force, what the published code does, and when it is full fine-tuning."
import json, math
from dataclasses import asdict, replace
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from timm_models import timm_model
from small import SIDE, load_backbone
from ssl_wikichurches.data.files import read_tensors
from ssl_wikichurches.finetune import core_tuning
from ssl_wikichurches.finetune import training as finetune
from ssl_wikichurches.finetune.core_tuning import (MIXES, STRONG, ContrastiveModel, CoreTuningLoss, CoreTuningRecipe, MixingDraws, Projector, drawn_weight, fit_core_tuning, hardest_pairs,
                                          mixed_set, mixing_draws, published_pairs, published_share, same_labels, soft_cross_entropy, supcon_loss)
from ssl_wikichurches.finetune.training import make_recipe, new_classifier, train
from ssl_wikichurches.finetune.full import FullRecipe, fit_full, parameter_groups, restore_full
from ssl_wikichurches.finetune.tiers import tier_method

TIMM = ('vit_base_patch16_dinov3','vit_base_patch16_siglip_224')
def model(name): return timm_model(name) if name in TIMM else load_backbone(name)

@pytest.fixture(scope='module')
def data(two_dozen): return two_dozen

def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
def numbers(history): return history.drop(columns='images_per_second')
def some(n=12, d=7, seed=0, classes=4, dtype=torch.double):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=dtype),torch.randint(classes, (n,), generator=g)
def pairs_of(t): return (t[:,None]==t)&~torch.eye(len(t), dtype=torch.bool)

# ---- the contrastive loss

def by_hand(v, labels, tau, focal=False, over_all=False):
    "Anchor by anchor, pair by pair."
    v,n = np.asarray(v, float),len(v)
    losses = []
    for i in range(n):
        others = [k for k in range(n) if k!=i]
        total = sum(math.exp(v[i]@v[k]/tau) for k in others)
        mine = [j for j in others if np.abs(np.asarray(labels[j], float)-np.asarray(labels[i], float)).max()<1e-6]
        if not mine: continue
        p = [math.exp(v[i]@v[j]/tau)/total for j in mine]
        losses.append(sum(-(1-q if focal else 1)*math.log(q) for q in p)/(n if over_all else len(mine)))
    return sum(losses)/len(losses) if losses else 0.

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 14), tau=st.sampled_from((.07,.3,1.)), focal=st.booleans(), over_all=st.booleans())
def test_loss_against_a_loop(seed, n, tau, focal, over_all):
    v,t = some(n, seed=seed); v = F.normalize(v, dim=1)
    want = by_hand(v.numpy(), t[:,None].numpy(), tau, focal, over_all)
    assert supcon_loss(v, pairs_of(t), tau, focal, over_all).item()==pytest.approx(want, rel=1e-10, abs=1e-12)

@pytest.mark.parametrize('focal', (False,True))
def test_gradient_of_the_loss_by_finite_differences(focal):
    z,t = some(8)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: supcon_loss(F.normalize(z, dim=1), pairs_of(t), .3, focal), z, atol=1e-7)

def test_the_focal_weight_has_a_gradient():
    "As published, 1-p is not detached."
    z,t = some(8)
    def grad(weighted):
        v = z.clone().requires_grad_(); u = F.normalize(v, dim=1)
        if weighted: loss = supcon_loss(u, pairs_of(t), .5, focal=True)
        else: # the weight as a constant
            sim = (u@u.T/.5); logp = sim-sim.masked_fill(torch.eye(8, dtype=torch.bool), -torch.inf).logsumexp(1, keepdim=True)
            terms = (-(1-logp.exp()).detach()*logp*pairs_of(t)).sum(1); count = pairs_of(t).sum(1)
            loss = (terms/count.clamp(min=1))[count>0].mean()
        loss.backward()
        return v.grad
    assert (grad(True)-grad(False)).abs().max()>1e-3

@pytest.mark.parametrize('t', ([0],[0,1,2,3],[0,0,1,2,3],[0,0]))
@pytest.mark.parametrize('focal', (False,True))
def test_singleton_classes_are_finite(t, focal):
    t = torch.tensor(t)
    z,_ = some(len(t)); z.requires_grad_()
    loss = supcon_loss(F.normalize(z, dim=1), pairs_of(t), .07, focal)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all() and (loss==0 if not pairs_of(t).any() else True)
    with pytest.raises(ValueError, match='expected'): supcon_loss(z, torch.ones(1,2).bool())

# ---- hard pairs

@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 16))
def test_hardest_pairs_by_brute_force(seed, n):
    z,t = some(n, seed=seed, dtype=torch.float)
    cos = np.array([[F.cosine_similarity(a, b, dim=0).item() for b in z] for a in z])
    for i,(p,q) in enumerate(zip(*(v.tolist() for v in hardest_pairs(z, t)))):
        mine,others = [j for j in range(n) if j!=i and t[j]==t[i]],[j for j in range(n) if t[j]!=t[i]]
        assert (p==-1)==(not mine) and (q==-1)==(not others)
        if mine: assert p!=i and t[p]==t[i] and cos[i,p]<=min(cos[i,j] for j in mine)+1e-6
        if others: assert t[q]!=t[i] and cos[i,q]>=max(cos[i,j] for j in others)-1e-6

def published(z, t):
    "Quirk a, as numpy says it: zeros where a pair does not count, the first smallest; 0 becomes the anchor."
    u = z.numpy()/np.linalg.norm(z.numpy(), axis=1, keepdims=True)
    sim,t,n = u@u.T,t.numpy(),len(z)
    pos,neg = [],[]
    for i in range(n):
        row = [sim[i,j] if t[i]==t[j] and i!=j else 0. for j in range(n)]
        j = row.index(min(row)); pos.append(i if j==0 else j)
        row = [sim[i,j] if t[i]!=t[j] else 0. for j in range(n)]
        neg.append(row.index(max(row)))
    return pos,neg

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 16), shift=st.sampled_from((0.,1.,3.)))
def test_published_pairs(seed, n, shift):
    z,t = some(n, seed=seed, dtype=torch.float); z = z+shift
    assert tuple(v.tolist() for v in published_pairs(z, t))==published(z, t)

def test_what_the_published_argmin_finds():
    "Features that are all alike: never the hardest positive but by chance. Features around zero: as a rule it is found."
    hits = {}
    for shift in (0.,3.):
        rows = []
        for seed in range(20):
            z,t = some(32, 64, seed, dtype=torch.float)
            (right,_),(found,_) = hardest_pairs(z+shift, t),published_pairs(z+shift, t)
            rows += [(int(f)==i, bool(t[f]!=t[i]), bool(f==r)) for i,(f,r) in enumerate(zip(found, right))]
        hits[shift] = np.mean(rows, axis=0)
    assert hits[0.][2]>.9 and hits[3.][0]>.6 and hits[3.][1]>.15 and hits[3.][2]<.05

# ---- mixtures

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 16), alpha=st.sampled_from((.3,1.,4.)), faithful=st.booleans())
def test_draws(seed, n, alpha, faithful):
    _,t = some(n, seed=seed)
    d = mixing_draws(t, np.random.default_rng(seed), alpha, faithful)
    assert (d.semi>=torch.tensor(.8)).all() and (d.semi<=1).all() and (d.hard>=0).all() and (d.hard<=1).all()
    if faithful: assert sorted(d.partner.tolist())==list(range(n))
    else:
        for i,j in enumerate(d.partner.tolist()): assert t[j]!=t[i] if j>=0 else (t==t[i]).all()

def test_partners_are_drawn_evenly():
    t = torch.tensor([0,1,1,1,0])
    first = [mixing_draws(t, np.random.default_rng(s)).partner[0].item() for s in range(600)]
    assert set(first)=={1,2,3} and min(first.count(j) for j in (1,2,3))>150

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), faithful=st.booleans())
def test_the_set_against_a_loop(seed, n, faithful):
    z,t = some(n, seed=seed, dtype=torch.float)
    d = mixing_draws(t, np.random.default_rng(seed), 1., faithful)
    zs,ys = mixed_set(z, t, d, 4, faithful)
    pos,neg = published(z, t) if faithful else (v.tolist() for v in hardest_pairs(z, t))
    one = np.eye(4)[t.numpy()]; z = z.numpy()
    want = [(z[i],one[i]) for i in range(n)]
    want += [tuple((1-s)*a[i]+s*a[j] for a in (z,one)) for i,(s,j) in enumerate(zip(d.semi.tolist(), d.partner.tolist())) if j>=0]
    want += [tuple(h*a[p]+(1-h)*a[q] for a in (z,one)) for h,p,q in zip(d.hard.tolist(), pos, neg) if min(p, q)>=0]
    assert len(zs)==len(want) and (len(zs)==3*n or not faithful)
    np.testing.assert_allclose(zs, np.stack([w[0] for w in want]), atol=1e-5); np.testing.assert_allclose(ys, np.stack([w[1] for w in want]), atol=1e-6)
    np.testing.assert_allclose(ys.sum(1), 1, atol=1e-6)

def test_equal_labels():
    y = torch.tensor([[1,0,0,0],[.3,.7,0,0],[.3,.7,0,0],[1-1e-4,1e-4,0,0],[1.,0,0,0]])
    want = torch.zeros(5,5).bool(); want[0,4] = want[4,0] = want[1,2] = want[2,1] = True
    assert torch.equal(same_labels(y), want)
    assert torch.equal(same_labels(F.one_hot(torch.tensor([0,1,1,3]), 4).float()), pairs_of(torch.tensor([0,1,1,3])))
    y = torch.tensor([[.5,.5,0,0],[0,.55,0,0],[0,0,0,1.],[1e-5,0,0,1]])
    assert not same_labels(y).any() and same_labels(y, True)[0,1] and same_labels(y, True)[2,3] # quirk d: 1000.00001 is 1000 in single precision

def test_cross_entropy_of_one_hot_labels():
    z,t = some(20, 4, dtype=torch.float); w = torch.tensor([1.,2.,.5,3.])
    y = F.one_hot(t, 4).float()
    assert soft_cross_entropy(z, y, w).item()==pytest.approx(F.cross_entropy(z, t, w).item(), rel=1e-6)
    soft = torch.softmax(torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), 1)
    assert soft_cross_entropy(z, soft, torch.ones(4)).item()==pytest.approx(-(soft*z.log_softmax(1)).sum(1).mean().item(), rel=1e-6) # the papers' mean

# ---- the whole loss of a batch

def toy(recipe, d=7, weight=None, seed=0): # (loss of features, model)
    m = ContrastiveModel(nn.Identity(), new_classifier(d, seed), Projector(d, 5, seed)).double()
    with torch.no_grad(): m.classifier.weight.mul_(100)
    return CoreTuningLoss(m, recipe, torch.ones(4, dtype=torch.double) if weight is None else weight, seed),m

def loss_of(z, t, recipe, step=0, **kw):
    loss,m = toy(recipe, z.shape[1], **kw)
    class Features:
        def float(self): return z # keeps double precision
    total,parts = loss.loss(lambda x, features: Features(), z, t, step)
    return total,parts,m

def test_mixed_labels_that_are_pure_have_the_plain_loss_of_the_set(monkeypatch):
    z,t = some(10); t[:8] = torch.arange(8)%4
    ones = lambda t, rng, *a: MixingDraws(torch.ones(10, dtype=torch.double), torch.ones(10, dtype=torch.double), mixing_draws(t, rng).partner)
    monkeypatch.setattr(core_tuning, 'mixing_draws', ones)
    w = torch.tensor([1.,2.,.5,3.], dtype=torch.double)
    loss,_,m = loss_of(z, t, CoreTuningRecipe(eta=0.), weight=w)
    zs,ys = mixed_set(z, t, ones(t, np.random.default_rng((0,0))), 4)
    torch.testing.assert_close(loss, F.cross_entropy(m.classifier(zs), ys.argmax(1), w))

@pytest.mark.parametrize('mix', MIXES)
@pytest.mark.parametrize('faithful', (False,True))
def test_the_loss_by_hand(mix, faithful):
    z,t = some(9, seed=3); t[:4] = torch.arange(4)
    r = CoreTuningRecipe(eta=.7, mix=mix, faithful=faithful, tau=.2)
    loss,parts,m = loss_of(z, t, r, step=5)
    draws = mixing_draws(t, np.random.default_rng((0,5)), 1., faithful)
    zs,ys = mixed_set(z, t, draws, 4, faithful); y = F.one_hot(t, 4).double()
    a,b = [(zs,ys) if mix in ('both',k) else (z,y) for k in ('classes','contrast')]
    classes = -(a[1]*m.classifier(a[0]).log_softmax(1)).sum(1).mean()
    contrast = by_hand(m.projector(b[0]).detach().numpy(), b[1].numpy(), .2, True, faithful)*(1 if faithful else 6.3/192)
    assert loss.item()==pytest.approx(classes.item()+.7*contrast, rel=1e-6)
    assert parts==pytest.approx(dict(class_loss=classes.item(), contrast_loss=contrast), rel=1e-6)

def published_strength(z, t, project, rng, classes=10, eta=.1, tau=.07):
    "Eta times the contrastive loss of Core-tuning's code, step by step, of a batch as its loop sees it."
    n,y,u = len(t),np.eye(classes, dtype=np.float32)[t.numpy()],F.normalize(z, dim=1)
    features,labels = [z[i].detach() for i in range(n)],[y[i] for i in range(n)]
    for i,j in enumerate(rng.permutation(n)):
        lam = np.float32(max(rng.beta(1, 1), .8))
        features.append((1-lam)*z[i]+lam*z[j]); labels.append((1-lam)*y[i]+lam*y[j])
    pos,neg = published(z.detach(), t)
    for p,q in zip(pos, neg):
        lam = np.float32(rng.beta(1, 1))
        features.append(lam*z[p]+(1-lam)*z[q]); labels.append(lam*y[p]+(1-lam)*y[q])
    code = [float((torch.tensor(l)[None]@(10.**torch.arange(classes))[:,None]).item()) for l in labels]
    v,anchors = project(torch.stack(features)),[]
    for i in range(3*n):
        others = [k for k in range(3*n) if k!=i]
        total = (v[others]@v[i]/tau).logsumexp(0)
        logp = [v[i]@v[j]/tau-total for j in others if code[j]==code[i]]
        if logp: anchors.append(sum(-(1-l.exp())*l for l in logp)/(3*n)) # mean over a row of the set
    return eta*sum(anchors)/len(anchors)

def gradient(loss, module): return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*module.parameters()])]).norm().item()

@pytest.mark.parametrize('shift', (0.,2.)) # features around zero, and all alike
def test_the_default_is_as_strong_as_the_published_code_on_its_own_batches(shift):
    "64 images of CIFAR-10's ten classes, shuffled; loss, and its gradient in the projector, which stands behind either set."
    losses,gradients = {},{}
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        z,t = torch.randn(64, 48, generator=g)+shift,torch.randint(10, (64,), generator=g)
        m = ContrastiveModel(nn.Identity(), new_classifier(48, 0, 10), Projector(48, 32, seed))
        terms = dict(published=published_strength(z, t, m.projector, np.random.default_rng(seed)))
        for name,kw in dict(default={}, strong=STRONG, faithful=dict(faithful=True)).items():
            r = CoreTuningRecipe(**kw)
            made = CoreTuningLoss(m, r, torch.ones(10), seed)
            total,parts = made.loss(lambda x, features: z, z, t, 0)
            without,_ = CoreTuningLoss(m, replace(r, eta=0.), torch.ones(10), seed).loss(lambda x, features: z, z, t, 0)
            terms[name] = total-without
            assert terms[name].item()==pytest.approx(r.eta*parts['contrast_loss'], abs=1e-5)
        for k,v in terms.items():
            losses[k] = losses.get(k, 0)+v.item()
            gradients[k] = gradients.get(k, 0)+gradient(v, m.projector)
    for found in (losses, gradients):
        ratio = {k:v/found['published'] for k,v in found.items()}
        assert ratio['default']==pytest.approx(1, abs=.15) and ratio['faithful']==pytest.approx(1, abs=.05) and 25<ratio['strong']<37, ratio

def test_the_share_of_positives():
    "Counted in shuffled batches of ten even classes."
    t = torch.randint(10, (4000,64), generator=torch.Generator().manual_seed(0))
    others = (t[:,:,None]==t[:,None]).sum(2).double().mean().item()-1
    assert published_share()==pytest.approx(others/64, rel=.01) and published_share(3)==pytest.approx(others/192, rel=.01)
    assert CoreTuningRecipe().scale==published_share(parts=3)==pytest.approx(6.3/192)
    assert published_share(1, 32, 4)==pytest.approx(31/4/32)

def test_strength_is_in_the_recipe_and_the_strong_one_is_a_variant():
    weak,strong = (CoreTuningRecipe(eta=.5, **kw) for kw in ({}, STRONG))
    assert asdict(weak)['scale']<asdict(strong)['scale']==1 and asdict(weak)|STRONG==asdict(strong) # so runs of either are told apart
    assert make_recipe(tier_method('core_tuning-strong').recipe, **STRONG)==CoreTuningRecipe(**STRONG)
    z,t = some(12, seed=5); t[:] = torch.arange(12)%4
    a,b = (loss_of(z, t, r)[1] for r in (weak, strong))
    assert a['class_loss']==b['class_loss'] and a['contrast_loss']==pytest.approx(weak.scale*b['contrast_loss'], rel=1e-6)
    a,b = (loss_of(z, t, replace(r, faithful=True))[1] for r in (weak, strong))
    assert a==b # the published loss is what it is

def test_originals_reach_the_backbone_and_in_the_published_code_do_not():
    "Quirk b: the gradient of each feature, and what is left of it if the features themselves are detached."
    z,t = some(8); t[:] = torch.arange(8)%4
    def grad(r):
        x = z.clone().requires_grad_(); loss_of(x, t, r)[0].backward(); return x.grad
    assert (grad(CoreTuningRecipe()).norm(dim=1)>1e-4).all()
    x = z.clone().requires_grad_()
    draws = mixing_draws(t, np.random.default_rng((0,0)), 1., True)
    zs,ys = mixed_set(x, t, draws, 4, True)
    zs[:8].sum().backward(retain_graph=True); assert (x.grad==0).all() # published: nothing from the features themselves
    zs,_ = mixed_set(x, t, mixing_draws(t, np.random.default_rng(0)), 4)
    zs[:8].sum().backward(); assert (x.grad==1).all()
    x = z.clone().requires_grad_() # with pairs that no one mixes with: alone[0] enters nowhere but as itself
    alone = MixingDraws(torch.zeros(8).double(), torch.ones(8).double(), torch.tensor([1,2,3,4,5,6,7,1]))
    zs,_ = mixed_set(x, t, alone, 4, True); p,n = published_pairs(x, t)
    zs.square().sum().backward()
    assert ((x.grad[0]==0).all())==(0 not in n.tolist())

def permuted(d, order):
    where = torch.argsort(order)
    return MixingDraws(d.hard[order], d.semi[order], where[d.partner[order]])

@pytest.mark.parametrize('mix', MIXES)
def test_order_of_batch_and_names_of_classes_do_not_matter(mix, monkeypatch):
    z,t = some(12, seed=4); t[:] = torch.arange(12)%4
    d = mixing_draws(t, np.random.default_rng(1))
    r = CoreTuningRecipe(mix=mix, eta=1.)
    monkeypatch.setattr(core_tuning, 'mixing_draws', lambda *a: d)
    want = loss_of(z, t, r)[0].item()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(core_tuning, 'mixing_draws', lambda *a: permuted(d, order))
    assert loss_of(z[order], t[order], r)[0].item()==pytest.approx(want, rel=1e-6)
    monkeypatch.setattr(core_tuning, 'mixing_draws', lambda *a: d)
    name = torch.tensor([2,0,3,1])
    loss,m = toy(r)
    with torch.no_grad(): # row c of the classifier goes where class c goes
        m.classifier.weight.copy_(m.classifier.weight[torch.argsort(name)])
    class Features:
        def float(self): return z
    assert loss.loss(lambda x, features: Features(), z, name[t], 0)[0].item()==pytest.approx(want, rel=1e-6)

@pytest.mark.parametrize('faithful', (False,True))
@pytest.mark.parametrize('t', ([0,1,2,3],[0,0,0,0],[0,0,0,1],[2]))
def test_odd_batches_are_finite(t, faithful):
    t = torch.tensor(t); z,_ = some(len(t)); z.requires_grad_()
    loss,_,_ = loss_of(z, t, CoreTuningRecipe(faithful=faithful))
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()

# ---- training

SHORT = dict(epochs=2, batch=30, lr=1e-3, backbone_lr=1e-4)

@pytest.mark.parametrize('name', ('tiny-clip','tiny-siglip',*TIMM))
def test_without_its_terms_it_is_full_fine_tuning_bit_for_bit(data, name):
    full = fit_full(model(name), data, FullRecipe(**SHORT, drop_path=.1), 3)
    off = fit_core_tuning(model(name), data, CoreTuningRecipe(**SHORT, drop_path=.1, eta=0., mix='none', per_class=0), 3)
    assert same(full.state, off.state) and same(full.other, off.other)
    pd.testing.assert_frame_equal(numbers(full.history), numbers(off.history).drop(columns='class_loss'), check_exact=True)

def test_without_its_terms_it_is_the_plain_loop_on_the_same_balanced_batches(data):
    recipe = CoreTuningRecipe(**SHORT, eta=0., mix='none')
    off = fit_core_tuning(load_backbone('tiny-clip'), data, recipe, 3)
    m = finetune.StyleModel(load_backbone('tiny-clip'), new_classifier(96, 3))
    loaders = data.loaders(recipe, 3, 2)
    train(m, parameter_groups(m, recipe), loaders._replace(weight=drawn_weight(data, loaders.train, recipe)), recipe, 3)
    assert same({f'backbone.{k}':v for k,v in m.backbone.state_dict().items()}|finetune.classifier_state(m.classifier), off.state)

@pytest.mark.parametrize('name,more', [('tiny-clip',{}), ('tiny-siglip',dict(faithful=True)), ('tiny-dinov3',dict(mix='classes',focal=False)), ('tiny-clip',dict(precision='bfloat16')), *[(n,{}) for n in TIMM]])
def test_training_is_stored_as_full_fine_tuning_is(data, name, more):
    recipe = CoreTuningRecipe(**SHORT, **more)
    f = fit_core_tuning(model(name), data, recipe, 1)
    full = fit_full(model(name), data, FullRecipe(**SHORT|dict(epochs=1)))
    assert {k:v.shape for k,v in f.state.items()}=={k:v.shape for k,v in full.state.items()} # no projector
    again = restore_full(model(name), recipe, f.state)
    x = torch.rand(2, 3, data.size, data.size)
    with torch.no_grad(): assert torch.equal(again(x), f.backbone(x))
    assert torch.equal(finetune.load_classifier(f.state).weight, f.classifier.weight)
    assert (f.state['classifier.bias']==0).all()==recipe.faithful # the published classifier has none
    assert np.isfinite(numbers(f.history)).all().all() and {'class_loss','contrast_loss'}<={*f.history}
    width = f.backbone.dim
    assert f.n_trainable==full.n_trainable+width*width+width+256*width+256-4*recipe.faithful

def test_a_step_of_length_zero_moves_nothing(data):
    f = fit_core_tuning(load_backbone('tiny-clip'), data, CoreTuningRecipe(**SHORT|dict(epochs=1, lr=0., backbone_lr=0.)))
    fresh = load_backbone('tiny-clip').state_dict()
    assert all(torch.equal(v, fresh[k]) for k,v in f.backbone.state_dict().items())

def test_the_projector_is_in_the_checkpoint_alone_and_another_recipe_is_another_training(data, tmp_path):
    recipe = CoreTuningRecipe(**SHORT|dict(epochs=1))
    fitted = fit_core_tuning(load_backbone('tiny-clip'), data, recipe, 5, 'cpu', tmp_path)
    assert any('projector' in k for k in read_tensors(tmp_path/'checkpoint.safetensors')[0]) and not any('projector' in k for k in fitted.state)
    for other in (replace(recipe, tau=.1), replace(recipe, per_class=0), replace(recipe, faithful=True)):
        with pytest.raises(ValueError, match='another training'): fit_core_tuning(load_backbone('tiny-clip'), data, other, 5, 'cpu', tmp_path)

def test_weights_are_those_of_what_is_drawn(data):
    r = CoreTuningRecipe(batch=30)
    loader = data.loaders(r, 0, 3)[0]
    t = torch.cat([t for _,t in loader])
    w = drawn_weight(data, loader, r)
    assert w[t].mean().item()==pytest.approx(1, abs=1e-6) and len({round((w[c]*(t==c).sum()).item(), 3) for c in range(4)})==1
    assert torch.equal(drawn_weight(data, loader, replace(r, class_weights='none')), torch.ones(4))
    assert torch.equal(drawn_weight(data, data.loaders(r, 0)[0], replace(r, per_class=0)), data.weight(r))

def test_recipe():
    r = CoreTuningRecipe(eta=1., mix='contrast', per_class=3)
    assert CoreTuningRecipe(**json.loads(json.dumps(asdict(r))))==r and make_recipe(CoreTuningRecipe, eta=1, mix='contrast', per_class=3)==r
    assert CoreTuningRecipe().eta==.1
    for bad in (dict(eta=-1.), dict(scale=0.), dict(tau=0.), dict(dim=0), dict(per_class=-1), dict(mix='all'), dict(mix_alpha=0.), dict(accumulate=2)):
        with pytest.raises(ValueError, match='|'.join(bad)): CoreTuningRecipe(**bad)

def test_batches_too_small_for_the_classes_are_refused(data):
    with pytest.raises(ValueError, match='larger batches'): fit_core_tuning(load_backbone('tiny-clip'), data, CoreTuningRecipe(batch=6, epochs=1))

def test_several_processes_are_refused(data, monkeypatch):
    class Two(finetune.Team):
        def __init__(self): super().__init__(); self.n = 2
    monkeypatch.setattr(finetune, 'Team', Two)
    with pytest.raises(ValueError, match='one device'): fit_core_tuning(load_backbone('tiny-clip'), data, CoreTuningRecipe(epochs=1))
