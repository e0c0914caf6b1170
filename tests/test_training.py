"The loop as a lab would run it: killed and resumed, selected, stopped early, in parts, in half precision; groups by depth; the probe's optimum."
import itertools
from dataclasses import replace
from functools import cache, partial
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F
from small import SIDE, load_backbone
from ssl_wikichurches.finetune import training as finetune
from ssl_wikichurches.attention.capture import pooled_maps
from ssl_wikichurches.backbones.encoders import TINY
from ssl_wikichurches.finetune.checkpoint import put_tensors, trained_tensors
from ssl_wikichurches.finetune.devices import Team
from ssl_wikichurches.finetune.tiers import TIERS
from ssl_wikichurches.finetune.training import BalancedBatches, Recipe, StyleModel, make_recipe, new_classifier, predict
from ssl_wikichurches.finetune.full import FullRecipe, depth_of, fit_full, parameter_groups, stochastic_depth
from ssl_wikichurches.finetune.linear import LinearRecipe, fit_linear, logistic_probe, pooled_features
from ssl_wikichurches.finetune.lora import LoraRecipe, add_adapters, fit_lora
from ssl_wikichurches.finetune.lp_ft import LpFtRecipe, fit_lp_ft, probe_classifier

def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
def numbers(history): return history.drop(columns='images_per_second', errors='ignore')

# ---- killed and resumed

class Killed(Exception): pass

def killed_after(monkeypatch, steps):
    "Lets so many steps happen."
    real,count = finetune._gradients,itertools.count()
    def step(*args):
        if next(count)==steps: raise Killed
        return real(*args)
    monkeypatch.setattr(finetune, '_gradients', step)

@pytest.fixture(scope='module')
def trained(two_dozen):
    "How a tier is trained, and what comes out without a break."
    def fit(tier, folder=None): # three steps an epoch
        return TIERS[tier].fit(load_backbone('tiny-clip'), two_dozen, make_recipe(TIERS[tier].recipe, epochs=3, lr=1e-3, batch=9), 5, 'cpu', folder)
    return fit,cache(fit)

@pytest.mark.parametrize('tier,steps', [*((t,4) for t in TIERS), *(('full',s) for s in (0,2,3,8))])
def test_killed_and_resumed_ends_with_the_same_bits(tier, steps, trained, tmp_path, monkeypatch):
    fit,whole = partial(trained[0], tier),trained[1](tier)
    with monkeypatch.context() as m:
        killed_after(m, steps)
        with pytest.raises(Killed): fit(tmp_path)
    assert (tmp_path/'checkpoint.safetensors').is_file()==(steps>=3)
    counted = itertools.count(); real = finetune._gradients
    monkeypatch.setattr(finetune, '_gradients', lambda *a: (next(counted), real(*a))[1])
    again = fit(tmp_path)
    assert next(counted)==9-3*(steps//3) # only what was lost is done again
    assert same(again.state, whole.state) and same(again.other, whole.other) and again.best_epoch==whole.best_epoch
    pd.testing.assert_frame_equal(numbers(again.history), numbers(whole.history), check_exact=True)

def test_a_checkpoint_of_another_training_is_refused(data, tmp_path):
    fit_full(load_backbone('tiny-clip'), data, FullRecipe(epochs=1), 0, 'cpu', tmp_path)
    for recipe,seed,some in ((FullRecipe(epochs=2),0,data), (FullRecipe(epochs=1),1,data), (FullRecipe(epochs=1),0,replace(data, split=replace(data.split, train=data.split.train[1:])))):
        with pytest.raises(ValueError, match='another training'): fit_full(load_backbone('tiny-clip'), some, recipe, seed, 'cpu', tmp_path)

def test_a_broken_checkpoint_is_named(data, tmp_path):
    (tmp_path/'checkpoint.safetensors').write_bytes(b'not a file of tensors')
    with pytest.raises(ValueError, match='checkpoint.safetensors'): fit_full(load_backbone('tiny-clip'), data, FullRecipe(epochs=1), 0, 'cpu', tmp_path)

def test_tensors_of_another_model_are_not_put():
    with pytest.raises(ValueError, match='first'): put_tensors(nn.Linear(2,2), trained_tensors(nn.Linear(3,2)))

# ---- selection

def test_best_and_last_are_both_kept(two_dozen, monkeypatch):
    "Of equally good epochs the first; that the second and the third are, and better than the others, is said by the test."
    real,recipe = finetune._validate,FullRecipe(epochs=4, lr=3e-3, backbone_lr=3e-4)
    def fit(select):
        order = iter((.2,.5,.5,.4))
        monkeypatch.setattr(finetune, '_validate', lambda *a: real(*a)|dict(val_balanced_accuracy=next(order)))
        return fit_full(load_backbone('tiny-clip'), two_dozen, replace(recipe, select=select))
    last,best = fit('last'),fit('best')
    assert last.best_epoch==best.best_epoch==2
    assert same(last.state, best.other) and same(last.other, best.state) and not same(last.state, best.state)
    for fitted,epoch in ((last,4),(best,2)): # the model that is handed over is the one that was chosen
        logits,t = predict(StyleModel(fitted.backbone, fitted.classifier), two_dozen.loader('val'))
        assert F.cross_entropy(logits, t, two_dozen.weight(recipe)).item()==pytest.approx(fitted.history.val_loss[epoch], rel=1e-5)
    assert last.history.val_loss[4]!=pytest.approx(last.history.val_loss[2], rel=1e-3)

def test_patience_ends_a_training(two_dozen):
    still = FullRecipe(epochs=9, lr=0., backbone_lr=0., patience=2)
    fitted = fit_full(load_backbone('tiny-clip'), two_dozen, still)
    assert len(fitted.history)==3 and fitted.best_epoch==1 # the first of equals

@pytest.mark.parametrize('bad', [dict(select='first'), dict(patience=-1), dict(accumulate=0), dict(accumulate=33), dict(precision='int8')])
def test_bad_choices(bad):
    with pytest.raises(ValueError, match='|'.join(bad)): Recipe(**bad)

# ---- one step, in many ways

def one_step(recipe, seed=0):
    model = StyleModel(b := load_backbone('tiny-dinov3'), new_classifier(b.dim, seed)).eval()
    g = torch.Generator().manual_seed(seed)
    x,t = torch.rand(8, 3, SIDE, SIDE, generator=g),torch.randint(4, (8,), generator=g)
    of_classes = finetune.ClassLoss(model, torch.tensor([1.,2.,3.,4.]), Team(), recipe.accumulate)
    loss = of_classes(finetune._in_precision(model, recipe.precision), x, t, 0)['train_loss']
    return loss,{k:p.grad for k,p in model.named_parameters() if p.grad is not None}

def test_a_batch_in_parts_has_the_gradients_of_the_whole():
    (a,whole),(b,parts) = (one_step(Recipe(batch=8, accumulate=n)) for n in (1,3))
    assert a==pytest.approx(b, rel=1e-6) and all(torch.allclose(v, parts[k], atol=1e-6) for k,v in whole.items())
    model = StyleModel(b := load_backbone('tiny-dinov3'), new_classifier(b.dim)).eval()
    g = torch.Generator().manual_seed(0)
    x,t = torch.rand(8, 3, SIDE, SIDE, generator=g),torch.randint(4, (8,), generator=g)
    assert a==pytest.approx(F.cross_entropy(model(x), t, torch.tensor([1.,2.,3.,4.])).item(), rel=1e-6)

def test_half_precision_is_near_and_weights_stay_whole(data):
    (a,whole),(b,half) = one_step(Recipe(batch=8)),one_step(Recipe(batch=8, precision='bfloat16'))
    assert a!=b and a==pytest.approx(b, rel=.02)
    cosines = [F.cosine_similarity(v.flatten(), half[k].flatten(), dim=0) for k,v in whole.items() if v.norm()>1e-3]
    assert min(cosines)>.9 and all(v.dtype==torch.float32 for v in half.values())
    fitted = fit_full(load_backbone('tiny-clip'), data, FullRecipe(epochs=1, precision='bfloat16'))
    assert all(v.dtype==torch.float32 for v in fitted.state.values())

def test_permuting_a_batch_permutes_its_outputs(images):
    for name in TINY:
        b,order = load_backbone(name).requires_grad_(False),torch.tensor([2,0,3,1])
        assert torch.allclose(b(images)[order], b(images[order]), atol=1e-5), name

def test_history_says_what_happened(data):
    h = fit_full(load_backbone('tiny-clip'), data, FullRecipe(epochs=2)).history
    assert {'train_loss','grad_norm','images_per_second','lr_backbone','lr_classifier','val_loss','val_accuracy','val_balanced_accuracy','val_recall_gothic'}<={*h}
    assert (h.grad_norm>0).all() and (h.images_per_second>0).all() and np.isfinite(h).all().all()
    recalls = h[[c for c in h if c.startswith('val_recall_')]]
    assert np.allclose(recalls.mean(axis=1), h.val_balanced_accuracy)

# ---- another loss, and balanced batches

class Same(finetune.Objective):
    "The loss of the classes, as an objective that replaces it."
    replaces = True
    def __init__(self, weight): self.weight,self.steps = weight,[]
    def __call__(self, forward, x, t, step):
        self.steps.append(step)
        loss = F.cross_entropy(forward(x).float(), t, self.weight, reduction='sum')/self.weight[t].sum()
        loss.backward()
        return dict(train_loss=loss.item(), of_classes=loss.item())

def objective_fit(data, recipe, objective, folder=None, seed=0, more=()):
    model = StyleModel(b := load_backbone('tiny-clip'), new_classifier(b.dim, seed))
    groups = parameter_groups(model, recipe)+list(more)
    trained = finetune.train(model, groups, data.loaders(recipe, seed), recipe, seed, folder=folder, objective=objective)
    return trained.history,trained_tensors(model)

@pytest.mark.parametrize('precision', ('float32','bfloat16'))
def test_an_objective_that_is_the_loss_of_the_classes_changes_no_bit(data, precision):
    recipe,objective = FullRecipe(epochs=2, lr=1e-3, precision=precision),Same(data.weight(FullRecipe()))
    (plain,a),(replaced,b) = objective_fit(data, recipe, None),objective_fit(data, recipe, objective)
    assert same(a, b) and objective.steps==list(range(6))
    pd.testing.assert_frame_equal(numbers(plain), numbers(replaced).drop(columns='of_classes'), check_exact=True)
    assert 'of_classes' not in plain and np.allclose(replaced.of_classes, replaced.train_loss, rtol=.05)

def test_steps_of_an_objective_go_on_after_a_break(data, tmp_path, monkeypatch):
    recipe,objective = FullRecipe(epochs=3),Same(data.weight(FullRecipe()))
    whole = objective_fit(data, recipe, Same(objective.weight))[1]
    with monkeypatch.context() as m:
        killed_after(m, 4)
        with pytest.raises(Killed): objective_fit(data, recipe, objective, tmp_path)
    objective.steps.clear()
    assert same(objective_fit(data, recipe, objective, tmp_path)[1], whole) and objective.steps==list(range(3, 9))
    class Other(Same): pass
    for o in (None, Other(objective.weight)):
        with pytest.raises(ValueError, match='another training'): objective_fit(data, recipe, o, tmp_path)

def test_what_an_objective_cannot_have(data, monkeypatch):
    objective = Same(data.weight(FullRecipe()))
    with pytest.raises(ValueError, match='accumulate=1'): objective_fit(data, FullRecipe(accumulate=2), objective)
    lost = dict(params=[nn.Parameter(torch.zeros(2))], lr=1., name='lost')
    with pytest.raises(ValueError, match='1 trained tensors are not part of the model'): objective_fit(data, FullRecipe(), objective, more=[lost])
    class Two(Team):
        def __init__(self): super().__init__(); self.n = 2
    monkeypatch.setattr(finetune, 'Team', Two)
    with pytest.raises(ValueError, match='2 processes'): objective_fit(data, FullRecipe(), objective)

def test_an_objective_that_is_not_finite_stops(data):
    class Bad(Same):
        def __call__(self, *args): return super().__call__(*args)|dict(train_loss=float('nan'))
    with pytest.raises(FloatingPointError, match='learning rate'): objective_fit(data, FullRecipe(epochs=1), Bad(data.weight(FullRecipe())))

@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 60), min_size=4, max_size=4), batch=st.integers(1, 40), per_class=st.integers(1, 4), seed=st.integers(0, 99))
def test_balanced_batches(counts, batch, per_class, seed):
    y = np.random.default_rng(seed).permutation(np.repeat(range(4), counts)); n,steps = len(y),-(-len(y)//batch)
    make = lambda: BalancedBatches(y, batch, torch.Generator().manual_seed(seed), per_class)
    if n//steps<4*per_class:
        with pytest.raises(ValueError, match='larger batches'): make()
        return
    order = make()
    batches = list(order)
    sizes,each = [len(b) for b in batches],[np.bincount(y[[i for i,_ in b]], minlength=4) for b in batches]
    assert len(batches)==len(order)==steps and sum(sizes)==n and max(sizes)<=batch and max(sizes)-min(sizes)<=1
    assert min(e.min() for e in each)>=per_class and (np.sum(each, axis=0)==order.places).all()
    shown = np.bincount([i for b in batches for i,_ in b], minlength=n)
    for c in range(4): assert np.ptp(shown[y==c])<=1 # no image of a class is shown twice more than another
    enough = np.array(counts)>=per_class*steps
    assert (order.places[enough]<=np.array(counts)[enough]).all() and (order.places[~enough]==per_class*steps).all()
    assert enough.all()==(shown==1).all()
    assert len({s for b in batches for _,s in b})==n and batches==list(make()) and (n<4 or list(order)!=batches)

def test_balanced_photographs_follow_from_the_seed_and_not_from_workers(data):
    recipe = FullRecipe(batch=26)
    first = list(data.loaders(recipe, 3, 2)[0])
    here = torch.get_rng_state()
    for a,b in zip(first, replace(data, workers=2).loaders(recipe, 3, 2)[0]): assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert torch.equal(torch.get_rng_state(), here) and sum(len(t) for _,t in first)==len(data.split.train)
    assert min(np.bincount(t, minlength=4).min() for _,t in first)>=2
    assert not torch.equal(first[0][0], next(iter(data.loaders(recipe, 4, 2)[0]))[0])
    with pytest.raises(ValueError, match='drawn'): data.loader('train', per_class=2)
    with pytest.raises(ValueError, match='class 3'): finetune.class_places([3,3,3,0], 1, 1)

# ---- modes

@pytest.mark.parametrize('fit,recipe', [(fit_linear, LinearRecipe(epochs=1, views=1)), (fit_lora, LoraRecipe(epochs=1)), (fit_lp_ft, LpFtRecipe(epochs=1))])
def test_a_frozen_backbone_is_never_in_training_mode(fit, recipe, data):
    backbone,seen = load_backbone('tiny-dinov3'),[]
    backbone.register_forward_pre_hook(lambda m, args: seen.append(m.training))
    fit(backbone, data, recipe)
    assert seen and any(seen)==(fit is fit_lp_ft) # full fine-tuning trains it

# ---- groups

@pytest.mark.parametrize('name', TINY)
@pytest.mark.parametrize('decay', [1., .65])
def test_every_parameter_is_in_one_group(name, decay):
    model = StyleModel(b := load_backbone(name), new_classifier(b.dim))
    groups = parameter_groups(model, FullRecipe(layer_decay=decay))
    ids = [id(p) for g in groups for p in g['params']]
    assert sorted(ids)==sorted(id(p) for p in model.parameters() if p.requires_grad) and len(set(ids))==len(ids)
    for g in groups: assert {p.ndim<2 for p in g['params']}=={g.get('weight_decay')==0.}
    rates = {id(p):g['lr'] for g in groups for p in g['params']}
    for k,p in b.named_parameters():
        if not p.requires_grad: continue
        block = next((int(part) for part in k.split('.') if part.isdigit()), None)
        if block is not None and ('layer' in k or 'blocks' in k): assert rates[id(p)]==pytest.approx(1e-5*decay**(4-block)), k
        else: assert rates[id(p)]==pytest.approx(1e-5*decay**(5-depth_of(k, 4))), k

@pytest.mark.parametrize('name,depth', [('embeddings.cls_token',0), ('model.embeddings.patch_embeddings.projection.weight',0), ('pos_embed',0), ('vision_model.pre_layrnorm.weight',0),
    ('model.layer.0.norm1.weight',1), ('encoder.layers.3.mlp.fc1.bias',4), ('blocks.3.attn.qkv.weight',4), ('norm.weight',5), ('head.probe',5), ('vision_model.head.layernorm.bias',5), ('post_layernorm.weight',5)])
def test_depth_of_a_weight(name, depth): assert depth_of(name, 4)==depth

def test_without_decay_by_depth_the_step_is_plain_adamw():
    def step(make):
        model = StyleModel(b := load_backbone('tiny-mae'), new_classifier(b.dim))
        optimizer = torch.optim.AdamW(make(model), weight_decay=.01, fused=True)
        g = torch.Generator().manual_seed(0)
        F.cross_entropy(model(torch.rand(4, 3, SIDE, SIDE, generator=g)), torch.tensor([0,1,2,3])).backward()
        optimizer.step()
        return {k:v.clone() for k,v in model.state_dict().items()}
    def by_hand(model):
        return [dict(params=[p], lr=1e-4 if k.startswith('classifier') else 1e-5, weight_decay=0. if p.ndim<2 else .01) for k,p in model.named_parameters() if p.requires_grad]
    assert same(step(lambda m: parameter_groups(m, FullRecipe())), step(by_hand))

def test_stochastic_depth_skips_as_often_as_it_says():
    b = load_backbone('tiny-dinov2').requires_grad_(False).train()
    block = b.model.get_submodule('encoder.layer.3') if hasattr(b.model, 'encoder') else b.model.layer[3]
    skipped = []
    with stochastic_depth(b, .5):
        block.register_forward_hook(lambda m, args, out: skipped.append(((out[0] if isinstance(out, tuple) else out)-args[0]).flatten(1).abs().sum(1)==0))
        torch.manual_seed(0)
        for _ in range(40): b(torch.rand(8, 3, SIDE, SIDE))
    share = torch.cat(skipped).float().mean().item()
    assert share==pytest.approx(.5, abs=.1)
    with pytest.raises(ValueError, match='drop_path'): FullRecipe(drop_path=1.)

# ---- the probe's optimum, and starting from it

def objective(w, b, x, y, weight, c):
    "Scikit-learn's: C times the weighted sum of losses, plus half the squared norm of W."
    return c*F.cross_entropy(x@w.T+b, y, weight, reduction='sum')+w.square().sum()/2

def test_the_probe_is_the_minimum_that_another_solver_finds(data):
    backbone = load_backbone('tiny-siglip')
    features,val = (pooled_features(backbone, data.loader(p)) for p in ('train','val'))
    weight = data.weight(LinearRecipe())
    x,y = features.tensors[0].double(),features.tensors[1]
    mean,std = x.mean(0),x.std(0, unbiased=False)
    z,wd = (x-mean)/std,weight.double()
    for c in (.01, 1.):
        layer,_ = logistic_probe(features, val, weight, (c,))
        w,b = layer.weight.detach().double()*std,layer.bias.detach().double()+layer.weight.detach().double()@mean # of standardized features again
        ours = objective(w, b, z, y, wd, c).item()
        def f(v):
            v = torch.tensor(v, requires_grad=True)
            loss = objective(v[:-4].view(4,-1), v[-4:], z, y, wd, c); loss.backward()
            return loss.item(),v.grad.numpy()
        theirs = minimize(f, np.zeros(4*x.shape[1]+4), jac=True, method='L-BFGS-B', options=dict(maxiter=20_000, ftol=1e-15, gtol=1e-9, maxfun=10**6)).fun
        assert ours==pytest.approx(theirs, rel=1e-4)

def test_epochs_approach_the_optimum(data):
    "The same objective by AdamW on the cache: with its decay off and C large, its loss comes near."
    backbone = load_backbone('tiny-siglip')
    features,val = (pooled_features(backbone, data.loader(p)) for p in ('train','val'))
    weight = data.weight(LinearRecipe())
    optimum,_ = logistic_probe(features, val, weight, (1e4,))
    fitted = fit_linear(backbone, data, LinearRecipe(epochs=400, lr=.1, weight_decay=0.))
    loss = lambda m: F.cross_entropy(m(features.tensors[0]), features.tensors[1], weight).item()
    assert loss(optimum)<=loss(fitted.classifier)+1e-4 and loss(fitted.classifier)<.2*np.log(4)

def test_the_solver_of_the_tier(data):
    fitted = fit_linear(load_backbone('tiny-siglip'), data, LinearRecipe(solver='logistic'))
    assert fitted.history.index.name=='C' and same(fitted.state, TIERS['linear'].fit(load_backbone('tiny-siglip'), data, LinearRecipe(solver='logistic'), 9).state)

@pytest.mark.parametrize('name', ('tiny-dinov2','tiny-siglip','tiny-supervised'))
def test_lp_ft_starts_at_the_probe(name, data):
    backbone,frozen = load_backbone(name),load_backbone(name)
    probe = probe_classifier(frozen, data)
    fitted = fit_lp_ft(backbone, data, LpFtRecipe(epochs=1, lr=0., backbone_lr=0.))
    loader = data.loader('val')
    assert torch.equal(predict(StyleModel(fitted.backbone, fitted.classifier), loader)[0], predict(StyleModel(frozen, probe), loader)[0])

def test_ends_of_the_weight_path(data, images):
    "Interpolating weights, its ends are the frozen and the fine-tuned model."
    frozen,fitted = load_backbone('tiny-dinov2'),fit_full(load_backbone('tiny-dinov2'), data, FullRecipe(epochs=1, backbone_lr=1e-3))
    a,b = frozen.state_dict(),{k:v.clone() for k,v in fitted.backbone.state_dict().items()}
    def at(alpha):
        model = load_backbone('tiny-dinov2').requires_grad_(False)
        model.load_state_dict({k:torch.lerp(a[k], b[k], alpha) if a[k].is_floating_point() else a[k] for k in a})
        return pooled_maps(model, images)
    assert torch.equal(at(0.), pooled_maps(frozen.requires_grad_(False), images)) and torch.equal(at(1.), pooled_maps(fitted.backbone.requires_grad_(False), images))
    assert not torch.equal(at(.5), at(1.))

def test_lora_at_vit_b_size_adapts_24_projections():
    from transformers import CLIPVisionConfig, CLIPVisionModel
    backbone = load_backbone('tiny-clip')
    backbone.model = CLIPVisionModel(CLIPVisionConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=64, image_size=32, patch_size=16))
    backbone.dim,backbone.depth = 768,12
    assert len(add_adapters(backbone, LoraRecipe()))==24
    model = StyleModel(backbone, new_classifier(768))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad)==294_912+3_076

@pytest.mark.parametrize('changes', [dict(targets='qk'), dict(targets='v'), dict(targets='qkv'), dict(rslora=True), dict(dora=True)])
@pytest.mark.parametrize('name', ['tiny-siglip','tiny-supervised'])
def test_variants_of_lora_are_saved_and_restored(changes, name, two_dozen, images):
    recipe = LoraRecipe(epochs=1, lr=1e-3, **changes)
    fitted = fit_lora(load_backbone(name), two_dozen, recipe)
    again = TIERS['lora'].restore(load_backbone(name), recipe, fitted.state).requires_grad_(False)
    assert torch.equal(pooled_maps(again, images), pooled_maps(fitted.backbone.requires_grad_(False), images))

@pytest.mark.parametrize('targets', ['', 'qq', 'x'])
def test_targets_that_are_none(targets):
    with pytest.raises(ValueError, match='targets'): LoraRecipe(targets=targets)
