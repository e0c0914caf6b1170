"Invariants of the loop and of the three tiers, on tiny backbones and, where present, on a real one."
from dataclasses import replace
import numpy as np, pytest, torch
from peft.tuners.lora import LoraLayer
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from small import SIDE, load_backbone
from ssl_wikichurches.attention.capture import pooled_maps
from ssl_wikichurches.backbones.encoders import TINY
from ssl_wikichurches.data.splits import make_split
from ssl_wikichurches.data.download import load_churches
from ssl_wikichurches.finetune.tiers import TIERS
from ssl_wikichurches.finetune.training import Recipe, TrainData, class_weights, classification_scores, lr_factor, make_recipe
from ssl_wikichurches.finetune.full import FullRecipe, fit_full
from ssl_wikichurches.finetune.linear import LinearRecipe, fit_linear
from ssl_wikichurches.finetune.lora import LoraRecipe, add_adapters, fit_lora, merge_adapters


def frozen_maps(name, images): return pooled_maps(load_backbone(name).requires_grad_(False), images)

def numbers(fitted): return fitted.history.drop(columns='images_per_second')

def test_recipes_are_the_plan():
    assert LinearRecipe()==LinearRecipe(epochs=50, batch=32, lr=1e-3, weight_decay=.01, warmup=.1)
    assert LoraRecipe()==LoraRecipe(epochs=20, batch=32, lr=1e-4, weight_decay=.01, warmup=.1, rank=8, alpha=32, dropout=.1, augment=True)
    assert FullRecipe()==FullRecipe(epochs=20, batch=32, lr=1e-4, backbone_lr=1e-5, weight_decay=.01, warmup=.1, clip=1., augment=True)

@pytest.mark.parametrize('bad', [dict(epochs=0), dict(batch=0), dict(lr=-1.), dict(warmup=1.), dict(class_weights='yes')])
def test_bad_recipes(bad):
    with pytest.raises(ValueError, match='|'.join(bad)): Recipe(**bad)

def test_make_recipe_checks_names_and_types():
    assert make_recipe(LoraRecipe, alpha=16)==LoraRecipe(alpha=16.)
    for bad in (dict(rnk=2), dict(rank=2.5), dict(augment=1), dict(epochs=True), dict(lr='1e-3')):
        with pytest.raises(ValueError, match='|'.join(bad)): make_recipe(LoraRecipe, **bad)

def test_schedule_against_its_formula():
    lrs = [lr_factor(i, 200, .1) for i in range(200)]
    assert np.allclose(lrs[:20], np.arange(1,21)/20) and np.allclose(lrs[20:], .5*(1+np.cos(np.pi*np.arange(180)/180)))
    assert lr_factor(0, 1, .1)==1 and lr_factor(0, 10, 0.)==1

def test_scores_and_weights_against_sklearn():
    g = np.random.default_rng(0); y,p = g.integers(0, 4, 300), g.integers(0, 4, 300)
    s = classification_scores(y, p)
    assert np.allclose([s['accuracy'],s['balanced_accuracy'],s['macro_f1']], [accuracy_score(y,p), balanced_accuracy_score(y,p), f1_score(y,p,average='macro')])
    from sklearn.utils.class_weight import compute_class_weight
    assert np.allclose(class_weights(y), compute_class_weight('balanced', classes=np.arange(4), y=y))
    with pytest.raises(ValueError, match='Baroque'): class_weights(np.array([0,1,2]))

@pytest.mark.parametrize('name', TINY)
def test_linear_probe_leaves_everything(name, data, images):
    backbone = load_backbone(name); before = {k:v.clone() for k,v in backbone.state_dict().items()}
    fitted = fit_linear(backbone, data, LinearRecipe(epochs=2))
    assert all(torch.equal(v, before[k]) for k,v in backbone.state_dict().items()) and not backbone.training
    assert all(p.grad is None for p in backbone.parameters())
    assert torch.equal(pooled_maps(fitted.backbone.requires_grad_(False), images), frozen_maps(name, images))

@pytest.mark.parametrize('tier,name', [*(('lora',n) for n in TINY), *((t,n) for t in ('full','lp_ft') for n in ('tiny-clip','tiny-siglip'))]) # adapters are merged family by family
def test_a_step_of_length_zero_moves_nothing(name, tier, two_dozen, images):
    still = dict(lr=0.)|({} if tier=='lora' else dict(backbone_lr=0.))
    recipe = make_recipe(TIERS[tier].recipe, epochs=1, class_weights='none', **still)
    fitted = TIERS[tier].fit(load_backbone(name), two_dozen, recipe)
    assert torch.equal(pooled_maps(fitted.backbone.requires_grad_(False), images), frozen_maps(name, images))

@pytest.mark.parametrize('tier,name', [*(('lora',n) for n in TINY), *((t,n) for t in TIERS if t!='lora' for n in ('tiny-clip','tiny-siglip')), ('full','tiny-mae'), ('block_expansion','tiny-supervised')])
def test_what_is_saved_is_what_was_measured(name, tier, two_dozen, images):
    more = dict(every=2) if tier=='block_expansion' else {} # one new block at the very end would leave the maps of the others as they were
    recipe = make_recipe(TIERS[tier].recipe, epochs=1, lr=1e-3, **more)
    fitted = TIERS[tier].fit(load_backbone(name), two_dozen, recipe, seed=1)
    again = TIERS[tier].restore(load_backbone(name), recipe, fitted.state).requires_grad_(False)
    assert torch.equal(pooled_maps(again, images), pooled_maps(fitted.backbone.requires_grad_(False), images))
    moved = (pooled_maps(again, images)-frozen_maps(name, images)).abs().max()
    assert moved==0 if tier=='linear' else moved>0

@pytest.mark.parametrize('tier', list(TIERS))
def test_same_seed_same_numbers(tier, two_dozen):
    recipe = make_recipe(TIERS[tier].recipe, epochs=1, batch=14)
    a,b,c = (TIERS[tier].fit(load_backbone('tiny-clip'), two_dozen, recipe, seed=s) for s in (0,0,1))
    assert numbers(a).equals(numbers(b)) and all(torch.equal(v, b.state[k]) for k,v in a.state.items())
    assert not numbers(a).equals(numbers(c))

def test_adapters_change_q_and_v_alone(two_dozen):
    backbone = load_backbone('tiny-dinov3'); names = add_adapters(backbone, LoraRecipe())
    assert len(names)==8 and all(n.split('.')[-1] in ('q_proj','v_proj') for n in names)
    merge_adapters(backbone)
    fitted = fit_lora(backbone, two_dozen, LoraRecipe(epochs=1))
    frozen = load_backbone('tiny-dinov3').state_dict()
    changed = {k for k,v in fitted.backbone.state_dict().items() if not torch.equal(v, frozen[k])}
    assert changed=={f'model.{n}.weight' for n in names}
    assert not any(isinstance(m, LoraLayer) for m in fitted.backbone.modules()) and fitted.n_trainable==4*2*8*2*96+4*97

@pytest.mark.parametrize('name', TINY)
def test_new_adapters_change_nothing(name, images):
    "Before they are trained they add zero; a fused layer that was split computes what it did."
    backbone = load_backbone(name)
    with torch.no_grad(): was = backbone(images)
    add_adapters(backbone, LoraRecipe())
    with torch.no_grad(): assert torch.allclose(backbone.eval()(images), was, atol=1e-5)

def test_gradients_of_the_first_step(data):
    backbone = load_backbone('tiny-dinov2'); add_adapters(backbone, LoraRecipe(dropout=0.))
    backbone(torch.rand(2,3,SIDE,SIDE)).square().sum().backward()
    grads = {k:p.grad.abs().sum().item() for k,p in backbone.named_parameters() if p.requires_grad}
    assert all(v==0 for k,v in grads.items() if 'lora_A' in k) and any(v>0 for k,v in grads.items() if 'lora_B' in k)

def test_a_loss_that_is_not_finite_stops(data):
    backbone = load_backbone('tiny-mae')
    with torch.no_grad(): next(p for p in backbone.parameters() if p.requires_grad).fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='learning rate'): fit_full(backbone, data, FullRecipe(epochs=1))

def test_weights_of_another_model_are_refused(two_dozen):
    state = fit_full(load_backbone('tiny-clip'), two_dozen, FullRecipe(epochs=1)).state
    with pytest.raises(ValueError, match='tiny-dinov2'): TIERS['full'].restore(load_backbone('tiny-dinov2'), FullRecipe(), state)
    adapters = fit_lora(load_backbone('tiny-clip'), two_dozen, LoraRecipe(epochs=1)).state
    with pytest.raises(ValueError, match='tiny-dinov2'): TIERS['lora'].restore(load_backbone('tiny-dinov2'), LoraRecipe(), adapters)

def test_full_fine_tuning_can_learn(data):
    fitted = fit_full(load_backbone('tiny-dinov2'), replace(data, split=replace(data.split, train=data.split.train[:32])),
                      FullRecipe(epochs=15, lr=2e-3, backbone_lr=2e-3, augment=False, class_weights='none'))
    assert fitted.history.train_loss.iloc[-1]<.5*fitted.history.train_loss.iloc[0]

def test_real_vit_tiny_moves_only_where_it_may(real):
    source = f"timm/vit_tiny_patch16_224@{real/'vit_tiny_in1k/model.safetensors'}"
    churches = load_churches(real/'photos', verify=False); split = make_split(churches)
    data = TrainData(churches, replace(split, train=split.train[::80], val=split.val[::20], eval=split.eval[:4]), 224)
    images = next(iter(data.loader('eval')))[0]
    before = pooled_maps(load_backbone(source, size=224).requires_grad_(False), images)
    fit = lambda tier, **k: pooled_maps(TIERS[tier].fit(load_backbone(source, size=224), data, make_recipe(TIERS[tier].recipe, epochs=1, class_weights='none', **k)).backbone.requires_grad_(False), images)
    assert torch.equal(fit('linear'), before) and torch.equal(fit('lora', lr=0.), before) and not torch.equal(fit('lora'), before)
