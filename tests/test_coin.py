"COIN: the switch between its stages, a classifier that stage 1 does not touch, losses against loops, and when it is another method."
import json, math
from dataclasses import asdict, replace
from fractions import Fraction
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from timm_models import timm_model
from small import SIDE, load_backbone
from ssl_wikichurches.finetune import training as finetune
from ssl_wikichurches.data.files import read_tensors
from ssl_wikichurches.finetune.coin import CoinLoss, CoinRecipe, class_cosines, class_pairs, fit_coin
from ssl_wikichurches.finetune.core_tuning import STRONG, ContrastiveModel, CoreTuningRecipe, Projector, fit_contrastive, fit_core_tuning, supcon_loss
from ssl_wikichurches.finetune.training import make_recipe, new_classifier
from ssl_wikichurches.finetune.full import FullRecipe, fit_full, restore_full

TIMM = ('vit_base_patch16_dinov3','vit_base_patch16_siglip_224')
NAMES = pytest.mark.parametrize('name', ('tiny-clip','tiny-siglip',*TIMM)) # a class token, a pooling head, and timm's of either kind
def model(name): return timm_model(name) if name in TIMM else load_backbone(name)
@pytest.fixture(scope='module')
def data(two_dozen): return two_dozen

def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
def numbers(history): return history.drop(columns='images_per_second')
def few(data):
    "At most eight photographs of each class to train on."
    names = data.labels.loc[list(data.split.train)].groupby(data.labels).head(8).index
    return replace(data, split=replace(data.split, train=tuple(names)))
def some(n=12, d=7, seed=0, classes=4):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.double),torch.randint(classes, (n,), generator=g)

# ---- the contrastive loss

def by_hand(v, t, tau, itself):
    "Anchor by anchor, pair by pair: Khosla et al., or the published code with its pairs of one image and its mean over a row."
    v,t,n = np.asarray(v),[int(c) for c in t],len(v)
    losses = []
    for i in range(n):
        total = sum(math.exp(v[i]@v[k]/tau) for k in range(n) if k!=i)
        terms = [-math.log(math.exp(v[i]@v[j]/tau)/total) for j in range(n) if t[j]==t[i] and (itself or j!=i)]
        if terms: losses.append(sum(terms)/(n if itself else len(terms)))
    return sum(losses)/len(losses) if losses else 0.

@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 14), tau=st.sampled_from((.07,.3,1.)), itself=st.booleans())
def test_loss_against_a_loop(seed, n, tau, itself):
    v,t = some(n, seed=seed); v = F.normalize(v, dim=1)
    assert supcon_loss(v, class_pairs(t, itself), tau, over_all=itself).item()==pytest.approx(by_hand(v, t, tau, itself), rel=1e-10, abs=1e-12)

@pytest.mark.parametrize('itself', (False,True))
def test_gradient_by_finite_differences(itself):
    z,t = some(8)
    assert torch.autograd.gradcheck(lambda z: supcon_loss(F.normalize(z, dim=1), class_pairs(t, itself), .3, over_all=itself), z.requires_grad_(), atol=1e-7)

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12))
def test_pairs(seed, n):
    _,t = some(n, seed=seed)
    for itself in (False,True):
        want = [[bool(t[i]==t[j]) and (itself or i!=j) for j in range(n)] for i in range(n)]
        assert class_pairs(t, itself).tolist()==want

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 12))
def test_cosines_against_a_loop(seed, n):
    z,t = some(n, seed=seed, classes=3); t[:3] = torch.tensor([0,0,1])
    cos = {(i,j):F.cosine_similarity(z[i], z[j], dim=0).item() for i in range(n) for j in range(n) if i!=j}
    a,b = (np.mean([c for (i,j),c in cos.items() if (t[i]==t[j])==k]) for k in (True,False))
    assert class_cosines(z, t)==pytest.approx(dict(within=a, between=b, gap=a-b), abs=1e-12)
    for bad in ([0,0],[0,1]):
        with pytest.raises(ValueError, match='another class'): class_cosines(z[:2], torch.tensor(bad))

# ---- the recipe

@settings(max_examples=300, deadline=None)
@given(thousandths=st.integers(0, 1000), epochs=st.integers(1, 500))
def test_length_of_stage_one_is_that_of_exact_fractions(thousandths, epochs):
    assert CoinRecipe(alpha=thousandths/1000, epochs=epochs).stage_one==math.ceil(Fraction(thousandths, 1000)*epochs)

def test_products_that_floating_point_gets_wrong():
    wrong = [(k,e) for k in range(101) for e in range(1, 201) if math.ceil(k/100*e)!=math.ceil(Fraction(k, 100)*e)]
    assert len(wrong)>20 and (7,100) in wrong # so the rounding is needed
    assert all(CoinRecipe(alpha=k/100, epochs=e).stage_one==math.ceil(Fraction(k, 100)*e) for k,e in wrong)

def test_recipe():
    r = CoinRecipe(eta=1., alpha=.5, per_class=3)
    assert CoinRecipe(**json.loads(json.dumps(asdict(r))))==r and make_recipe(CoinRecipe, eta=1, alpha=.5, per_class=3)==r
    assert (CoinRecipe().tau,CoinRecipe().alpha,CoinRecipe().eta,CoinRecipe().faithful)==(.3,.7,.1,False)
    for bad in (dict(alpha=-.1), dict(alpha=1.1), dict(patience=2), dict(select='best'), dict(accumulate=2), dict(tau=0.), dict(eta=-1.), dict(alpha=math.nan)):
        with pytest.raises(ValueError, match='|'.join(bad)): CoinRecipe(**bad)
    assert CoinRecipe(alpha=0., patience=2, select='best').stage_one==0 # nothing is in the way of it then

# ---- the loss of a batch

def toy(recipe, steps, weight=None, d=7):
    m = ContrastiveModel(nn.Identity(), new_classifier(d), Projector(d, 5)).double()
    with torch.no_grad(): m.classifier.weight.mul_(100)
    return CoinLoss(m, recipe, torch.ones(4, dtype=torch.double) if weight is None else weight, 0, steps),m

def loss_at(made, z, t, step):
    class Features:
        def float(self): return z # keeps double precision
    return made.loss(lambda x, features: Features(), z, t, step)

@pytest.mark.parametrize('faithful', (False,True))
@pytest.mark.parametrize('alpha,epochs', [(0.,3),(.5,4),(.07,100),(.7,5),(1.,3)])
def test_both_losses_by_hand_on_either_side_of_the_switch(alpha, epochs, faithful):
    z,t = some(10, seed=3); t[:4] = torch.arange(4)
    w = torch.tensor([1.,2.,.5,3.], dtype=torch.double)
    r = CoinRecipe(alpha=alpha, epochs=epochs, eta=.7, faithful=faithful)
    made,m = toy(r, 6, w)
    contrast = by_hand(m.projector(z).detach(), t, .3, faithful)*(1 if faithful else 6.3/64)
    logp = m.classifier(z).log_softmax(1)
    classes = (sum(-w[c]*logp[i,c] for i,c in enumerate(t))/w[t].sum()).item()
    switch = 6*math.ceil(Fraction(str(alpha))*epochs)
    for step in {0, switch-1, switch, switch+1, 6*epochs-1}-{-1}:
        want = contrast if step<switch else classes+.7*contrast
        loss,parts = loss_at(made, z, t, step)
        assert loss.item()==pytest.approx(want, rel=1e-10), step
        assert parts==pytest.approx(dict(stage=1, contrast_loss=contrast) if step<switch else dict(stage=2, class_loss=classes, contrast_loss=contrast), rel=1e-10)

def published_strength(v, t, itself=True):
    "The contrastive loss of COIN's code, anchor by anchor; its pairs of an image with itself can be left out."
    anchors = []
    for i in range(len(t)):
        sim = v@v[i]/.3
        total = sim[[k for k in range(len(t)) if k!=i]].logsumexp(0)
        logp = [sim[j]-total for j in range(len(t)) if t[j]==t[i] and (itself or j!=i)]
        if logp: anchors.append(-sum(logp)/len(t)) # mean over a row of the batch
    return sum(anchors)/len(anchors)

@pytest.mark.parametrize('step,weight', [(0,1.),(1,.1)]) # alone in stage 1, with the published eta beside the classes
@pytest.mark.parametrize('shift', (0.,2.)) # features around zero, and all alike
def test_the_default_is_as_strong_as_the_published_code_on_its_own_batches(step, weight, shift):
    "64 images of CIFAR-10's ten classes, shuffled."
    found = {}
    for seed in range(16):
        g = torch.Generator().manual_seed(seed)
        z,t = torch.randn(64, 48, generator=g)+shift,torch.randint(10, (64,), generator=g)
        m = ContrastiveModel(nn.Identity(), new_classifier(48, 0, 10), Projector(48, 32, seed))
        v = m.projector(z)
        terms = dict(published=weight*published_strength(v, t), pairs=weight*published_strength(v, t, False))
        for name,kw in dict(default={}, strong=STRONG, faithful=dict(faithful=True)).items():
            total,parts = CoinLoss(m, CoinRecipe(epochs=2, alpha=.5, **kw), torch.ones(10), 0, 1).loss(lambda x, features: z, z, t, step)
            terms[name] = total-F.cross_entropy(m.classifier(z), t) if step else total
        for k,u in terms.items(): found.setdefault(k, []).append((u.item(), torch.autograd.grad(u, m.projector.layers[2].weight, retain_graph=True)[0].norm().item()))
    loss,grad = ({k:np.array(u)[:,i].mean() for k,u in found.items()} for i in range(2))
    assert loss['default']==pytest.approx(loss['pairs'], rel=.05) and loss['default']==pytest.approx(loss['published'], rel=.15)
    assert grad['default']==pytest.approx(grad['pairs'], rel=.1) # self-pairs push another way, see the notebook
    for d in (loss, grad): assert d['faithful']==pytest.approx(d['published'], rel=1e-3) and 9<d['strong']/d['pairs']<11.5

def test_the_strong_variant():
    z,t = some(10)
    a,b = (loss_at(toy(CoinRecipe(epochs=2, alpha=.5, **kw), 1)[0], z, t, 0)[0].item() for kw in ({}, STRONG))
    assert CoinRecipe().scale==pytest.approx(6.3/64) and a==pytest.approx(CoinRecipe().scale*b, rel=1e-6)

@pytest.mark.parametrize('faithful', (False,True))
def test_stage_one_does_not_know_the_classifier(faithful):
    z,t = some(10)
    made,m = toy(CoinRecipe(epochs=2, alpha=.5, faithful=faithful), 5)
    def at(step):
        m.zero_grad(); loss,_ = loss_at(made, z, t, step); loss.backward()
        return loss.item(),m.classifier.weight.grad,m.classifier.bias.grad
    first,later = at(4),at(5)
    with torch.no_grad(): m.classifier.weight.normal_(); m.classifier.bias.normal_()
    assert at(4)==first and first[1:]==(None,None)
    assert at(5)[0]!=later[0] and at(5)[1].norm()>0
    with torch.no_grad(): m.classifier.weight.fill_(math.nan)
    assert at(4)==first

@pytest.mark.parametrize('step', (0,5))
def test_order_of_batch_and_names_of_classes_do_not_matter(step):
    z,t = some(12, seed=4); t[:] = torch.arange(12)%4
    made,m = toy(CoinRecipe(epochs=2, alpha=.5, eta=1.), 5)
    want,order,name = loss_at(made, z, t, step)[0].item(),torch.randperm(12, generator=torch.Generator().manual_seed(2)),torch.tensor([2,0,3,1])
    assert loss_at(made, z[order], t[order], step)[0].item()==pytest.approx(want, rel=1e-10)
    with torch.no_grad(): m.classifier.weight.copy_(m.classifier.weight[torch.argsort(name)])
    assert loss_at(made, z, name[t], step)[0].item()==pytest.approx(want, rel=1e-10)

@pytest.mark.parametrize('faithful', (False,True))
@pytest.mark.parametrize('t', ([0,1,2,3],[0,0,0,0],[0,0,0,1],[2]))
def test_odd_batches_are_finite(t, faithful):
    t = torch.tensor(t); z,_ = some(len(t)); z.requires_grad_()
    made,_ = toy(CoinRecipe(epochs=2, alpha=.5, faithful=faithful), 1)
    for step in (0,1):
        loss,_ = loss_at(made, z, t, step); loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()

# ---- training

SHORT = dict(batch=30, lr=1e-3, backbone_lr=1e-4)
def fresh(f): return new_classifier(f.backbone.dim, 1).state_dict()

class Spy(CoinLoss):
    "Notes at each step the stage and whether the classifier is still as made, and at which steps it gets a gradient."
    def __init__(self, *args):
        super().__init__(*args)
        Spy.seen,Spy.gradients = [],[]
        self.model.classifier.weight.register_hook(lambda g: Spy.gradients.append(self.step))
    def __call__(self, forward, x, t, step):
        self.step,made = step,new_classifier(self.model.backbone.dim, 1).state_dict()
        found = super().__call__(forward, x, t, step)
        Spy.seen.append(dict(step=step, stage=found['stage'], untouched=same(self.model.classifier.state_dict(), made)))
        return found

@pytest.mark.parametrize('name,epochs,alpha', [('tiny-clip',4,.5), ('tiny-siglip',5,.4), *[(n,3,.35) for n in TIMM]])
def test_switch_at_the_exact_epoch_and_classifier_untouched_before(data, name, epochs, alpha):
    some = few(data)
    recipe = CoinRecipe(**SHORT|dict(batch=16), epochs=epochs, alpha=alpha, weight_decay=.5)
    f = fit_contrastive(model(name), some, recipe, Spy, 1)
    per,stage_one = len(Spy.seen)//epochs,math.ceil(Fraction(str(alpha))*epochs)
    assert [s['step'] for s in Spy.seen]==list(range(per*epochs)) and per==math.ceil(len(some.split.train)/16)
    assert [s['stage'] for s in Spy.seen]==[1]*(per*stage_one)+[2]*(per*(epochs-stage_one))
    assert [s['untouched'] for s in Spy.seen]==[True]*(per*stage_one+1)+[False]*(per*(epochs-stage_one)-1)
    assert Spy.gradients==list(range(per*stage_one, per*epochs)) and not torch.equal(f.classifier.weight, fresh(f)['weight'])
    assert f.history.stage.tolist()==[1]*stage_one+[2]*(epochs-stage_one) and f.history.class_loss.isna().tolist()==[True]*stage_one+[False]*(epochs-stage_one)

@NAMES
def test_alpha_one_leaves_the_classifier_as_it_was_made(data, name):
    f = fit_coin(model(name), data, CoinRecipe(**SHORT, epochs=2, alpha=1., weight_decay=.5), 1)
    assert same(f.classifier.state_dict(), fresh(f))
    start = model(name).state_dict()
    assert not same(f.backbone.state_dict(), start) and 'class_loss' not in f.history

@NAMES
def test_without_first_stage_and_contrast_it_is_full_fine_tuning_bit_for_bit(data, name):
    full = fit_full(model(name), data, FullRecipe(**SHORT, epochs=1, drop_path=.1), 3)
    off = fit_coin(model(name), data, CoinRecipe(**SHORT, epochs=1, drop_path=.1, alpha=0., eta=0., per_class=0), 3)
    assert same(full.state, off.state) and same(full.other, off.other)
    pd.testing.assert_frame_equal(numbers(full.history), numbers(off.history)[numbers(full.history).columns], check_exact=True)

def test_without_first_stage_it_is_the_contrastive_term_of_core_tuning_alone(data):
    mine = fit_coin(load_backbone('tiny-clip'), data, CoinRecipe(**SHORT, epochs=2, alpha=0.), 3)
    other = fit_core_tuning(load_backbone('tiny-clip'), data, CoreTuningRecipe(**SHORT, epochs=2, mix='none', focal=False, tau=.3, scale=CoinRecipe().scale), 3)
    assert same(mine.state, other.state)

@NAMES
def test_budget_and_what_is_stored_are_those_of_full_fine_tuning(data, name):
    data = few(data)
    recipe = CoinRecipe(**SHORT, epochs=3, alpha=.3, faithful=name!='tiny-clip')
    f,full = fit_coin(model(name), data, recipe, 1),fit_full(model(name), data, FullRecipe(**SHORT, epochs=3), 1)
    rates = [c for c in full.history if c.startswith('lr_')]
    assert len(f.history)==len(full.history)==3 and rates and f.history[rates].equals(full.history[rates])
    loaders = data.loaders(recipe, 1, recipe.per_class)[0],data.loaders(FullRecipe(**SHORT), 1)[0]
    assert len(loaders[0])==len(loaders[1]) and sum(len(t) for _,t in loaders[0])==sum(len(t) for _,t in loaders[1])==len(data.split.train)
    assert {k:v.shape for k,v in f.state.items()}=={k:v.shape for k,v in full.state.items()} # no projector
    again,x = restore_full(model(name), recipe, f.state),torch.rand(2, 3, data.size, data.size)
    with torch.no_grad(): assert torch.equal(again(x), f.backbone(x))
    assert torch.equal(finetune.load_classifier(f.state).weight, f.classifier.weight) and (f.state['classifier.bias']==0).all()==recipe.faithful
    assert np.isfinite(numbers(f.history).drop(columns='class_loss')).all().all()

@NAMES
def test_gap_between_classes_rises_after_stage_one(data, name):
    x,t = (torch.cat(c) for c in zip(*data.loader('train')))
    def gap(b):
        with torch.no_grad(): return class_cosines(b.eval()(x), t)['gap']
    f = fit_coin(model(name), data, CoinRecipe(**SHORT|dict(backbone_lr=3e-4), epochs=3, alpha=1., augment=False), 1)
    assert gap(f.backbone)>gap(model(name))+.01

def test_a_step_of_length_zero_moves_nothing(data):
    f = fit_coin(load_backbone('tiny-clip'), data, CoinRecipe(**SHORT|dict(lr=0., backbone_lr=0.), epochs=2, alpha=.5), 1)
    assert same(f.backbone.state_dict(), load_backbone('tiny-clip').state_dict()) and same(f.classifier.state_dict(), fresh(f))

def test_half_precision(data):
    f = fit_coin(load_backbone('tiny-clip'), data, CoinRecipe(**SHORT, epochs=2, alpha=.5, precision='bfloat16'), 1)
    assert np.isfinite(f.history.train_loss).all()

def test_the_same_seed_and_a_training_killed_in_either_stage_end_with_the_same_bits(data, tmp_path, monkeypatch):
    data,recipe = few(data),CoinRecipe(**SHORT|dict(batch=16), epochs=4, alpha=.5)
    fit = lambda folder, seed=5: fit_coin(load_backbone('tiny-clip'), data, recipe, seed, 'cpu', folder)
    whole = fit(None)
    per = len(data.loaders(recipe, 5, 2)[0])
    assert not same(fit(None, 6).state, whole.state)
    class Killed(Exception): pass
    real = finetune._gradients
    for at,moments in ((2*per,False), (3*per+1,True)): # at the switch, in stage 2
        steps,folder = iter(range(100)),tmp_path/str(at)
        folder.mkdir()
        def step(*args):
            if next(steps)==at: raise Killed
            return real(*args)
        with monkeypatch.context() as m:
            m.setattr(finetune, '_gradients', step)
            with pytest.raises(Killed): fit(folder)
        kept = read_tensors(folder/'checkpoint.safetensors')[0]
        width = [k for k,v in kept.items() if k.startswith('optimizer:') and k.endswith('exp_avg') and tuple(v.shape)==(4,96)]
        assert bool(width)==moments # the classifier has no running means before stage 2
        again = fit(folder)
        assert same(again.state, whole.state) and same(again.other, whole.other)
        pd.testing.assert_frame_equal(numbers(again.history), numbers(whole.history), check_exact=True)
    for other in (replace(recipe, alpha=.25), replace(recipe, tau=.1), replace(recipe, faithful=True)):
        with pytest.raises(ValueError, match='another training'): fit_coin(load_backbone('tiny-clip'), data, other, 5, 'cpu', folder)
