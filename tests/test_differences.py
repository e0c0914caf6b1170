"The plan's own way: options of recipes that it needs, and a study file that says all of it."
import json
from dataclasses import replace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pandas as pd, pytest, torch
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model
from ssl_wikichurches.attention.capture import pooled_maps
from ssl_wikichurches.backbones.encoders import TINY, load_backbone
from ssl_wikichurches.backbones.registry import IMAGENET
from ssl_wikichurches.cli import compose_study
from ssl_wikichurches.finetune import training as finetune
from ssl_wikichurches.finetune.checkpoint import trained_tensors
from ssl_wikichurches.finetune.full import FullRecipe, fit_full, parameter_groups
from ssl_wikichurches.finetune.linear import LinearRecipe, OnFrozen, fit_linear
from ssl_wikichurches.finetune.training import StyleModel, new_classifier
from ssl_wikichurches.study.differences import PAPERS, PHOTOGRAPHS, STATISTICS, TRAINING, changed_fields, differences_table
from ssl_wikichurches.study.plan import Study, load_study, tier_recipe
from ssl_wikichurches.study.reader import open_study
from ssl_wikichurches.study.runs import run_study

PLAN = Path(__file__).parent.parent/'studies'/'plan.toml'
ANEW = LinearRecipe(epochs=3, augment=True)

@pytest.fixture
def data(two_dozen): return two_dozen

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def numbers(fitted): return fitted.history.drop(columns='images_per_second')

# ---- decay of vectors

@pytest.mark.parametrize('name', ('tiny-mae','tiny-siglip','tiny-supervised'))
def test_decay_of_all_weights_is_that_of_plain_adamw(name):
    def step(make):
        model = StyleModel(b := load_backbone(name), new_classifier(b.dim))
        optimizer = torch.optim.AdamW(make(model), weight_decay=.5, fused=True)
        F.cross_entropy(model(torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(0))), torch.tensor([0,1,2,3])).backward()
        optimizer.step()
        return {k:v.clone() for k,v in model.state_dict().items()}
    def by_hand(model): # as the plan writes it
        return [dict(params=[p for p in model.backbone.parameters() if p.requires_grad], lr=1e-5), dict(params=model.classifier.parameters(), lr=1e-4)]
    mine = step(lambda m: parameter_groups(m, FullRecipe(decay_vectors=True)))
    assert same(mine, step(by_hand)) and not same(mine, step(lambda m: parameter_groups(m, FullRecipe())))

def test_decay_of_vectors_by_depth():
    model = StyleModel(b := load_backbone('tiny-clip'), new_classifier(b.dim))
    groups = parameter_groups(model, FullRecipe(layer_decay=.5, decay_vectors=True))
    assert len(groups)==7 and not any('weight_decay' in g for g in groups)
    assert sum(len(g['params']) for g in groups)==sum(p.requires_grad for p in model.parameters())

def test_decay_of_vectors_in_a_training(data):
    fit = lambda **k: fit_full(load_backbone('tiny-clip'), data, FullRecipe(epochs=2, lr=1e-2, batch=9, weight_decay=.9, **k)).classifier
    default,decayed = fit(),fit(decay_vectors=True)
    assert not torch.equal(default.bias, decayed.bias)
    torch.testing.assert_close(default.weight, decayed.weight, atol=1e-3, rtol=0) # decayed in both

# ---- a linear probe of photographs that are augmented anew

@pytest.mark.parametrize('name', TINY)
def test_augmented_probe_leaves_everything(name, data, images):
    backbone,frozen = load_backbone(name),load_backbone(name)
    modes = []
    backbone.register_forward_pre_hook(lambda m, args: modes.append(m.training))
    fitted = fit_linear(backbone, data, ANEW)
    assert same(backbone.state_dict(), frozen.state_dict()) and modes and not any(modes)
    assert all(p.grad is None and p.requires_grad==q.requires_grad for p,q in zip(backbone.parameters(), frozen.parameters()))
    assert torch.equal(pooled_maps(fitted.backbone.requires_grad_(False), images), pooled_maps(frozen.requires_grad_(False), images))
    assert fitted.state.keys()=={'classifier.weight','classifier.bias'} and fitted.n_trainable==4*97

def test_augmented_probe_is_the_loop_with_a_backbone_that_is_frozen_by_hand(data):
    fitted = fit_linear(load_backbone('tiny-clip'), data, ANEW, 3)
    model = StyleModel((b := load_backbone('tiny-clip')).requires_grad_(False), new_classifier(b.dim, 3))
    groups = [dict(params=list(model.classifier.parameters()), lr=ANEW.lr, name='classifier')]
    trained = finetune.train(model, groups, data.loaders(ANEW, 3), ANEW, 3, train_mode=model.eval)
    pd.testing.assert_frame_equal(trained.history.drop(columns='images_per_second'), numbers(fitted), check_exact=True)
    assert torch.equal(fitted.state['classifier.weight'], model.classifier.weight)

def test_augmented_probe_sees_other_views_in_every_epoch(data):
    seen,backbone = [],load_backbone('tiny-clip')
    backbone.register_forward_pre_hook(lambda m, args: seen.append(args[0].sum((1,2,3)).sort().values))
    one = replace(data, split=replace(data.split, train=data.split.train[:1]+tuple(n for n in data.split.train if data.labels[n]>0)[:8], val=data.split.val[:4]))
    fit_linear(backbone, one, LinearRecipe(epochs=3, augment=True, class_weights='none'))
    train = [s for s in seen if len(s)==9]
    assert len(train)==3 and not any(torch.equal(a, b) for a,b in zip(train, train[1:]))
    val = [s for s in seen if len(s)==4]
    assert all(torch.equal(v, val[0]) for v in val)

def test_augmented_probe_goes_on_after_a_break(data, tmp_path, monkeypatch):
    whole,calls = fit_linear(load_backbone('tiny-clip'), data, ANEW),[]
    forward = OnFrozen.forward
    def broken(self, images):
        calls.append(1)
        if len(calls)==4: raise KeyboardInterrupt
        return forward(self, images)
    with monkeypatch.context() as m:
        m.setattr(OnFrozen, 'forward', broken)
        with pytest.raises(KeyboardInterrupt): fit_linear(load_backbone('tiny-clip'), data, ANEW, folder=tmp_path)
    again = fit_linear(load_backbone('tiny-clip'), data, ANEW, folder=tmp_path)
    assert same(again.state, whole.state) and numbers(again).equals(numbers(whole))

def test_best_epoch_of_an_augmented_probe(data):
    last,best = (fit_linear(load_backbone('tiny-clip'), data, replace(ANEW, epochs=6, lr=.05, select=s)) for s in ('last','best'))
    assert last.best_epoch==best.best_epoch
    if last.best_epoch<6: assert same(last.other, best.state) and same(best.other, last.state)

@pytest.mark.parametrize('other', (dict(views=1), dict(solver='logistic')))
def test_what_does_not_go_with_augmentation(other):
    with pytest.raises(ValueError, match='choose one'): LinearRecipe(augment=True, **other)

# ---- the study file

def test_the_study_file_by_the_command():
    study = compose_study(str(PLAN))
    assert study==load_study(PLAN) and study.name=='plan' and len(study.models)*len(study.tiers)*len(study.seeds)==18
    apart = compose_study(str(PLAN), tiers='full,attn_supervised')
    recipe = tier_recipe(apart, 'attn_supervised')
    assert (recipe.kind, recipe.decay_vectors, recipe.class_weights)==('cosine', True, 'none')

def test_the_study_file_differs_as_the_page_says():
    named = {f:(d.default, d.planned) for d in PHOTOGRAPHS+TRAINING+STATISTICS for f in d.fields}
    assert changed_fields(load_study(PLAN))==named
    other = replace(load_study(PLAN), geometry='squash')
    assert {*named}-{*changed_fields(other)}=={'geometry'}

def test_changed_fields():
    assert changed_fields(Study())=={}
    assert changed_fields(Study(models=('mae','mine=folder')), Study(models=('mae','clip')))=={'models.clip':('clip',None), 'models.mine':(None,'folder')}
    follows = Study(tiers=('full','coin','full-slow'), recipes={'full':dict(lr=1e-3), 'full-slow':dict(epochs=40)})
    assert changed_fields(follows, Study(tiers=follows.tiers[:2]))=={'tiers':(('full','coin'),follows.tiers), 'full.lr':(1e-4,1e-3), 'full-slow.epochs':(None,40)}

def test_tables_are_tables():
    for records in (PHOTOGRAPHS, TRAINING, STATISTICS, PAPERS):
        lines = differences_table(records).split('\n')
        assert len(lines)==len(records)+2 and {l.count(' | ') for l in lines}=={4}
        for r in records: assert not r.fields or r.how=='—', r.about # one way to get it

# ---- what the file asks of backbones

def test_dinov2_without_registers(tmp_path, drawn):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=96, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=64, patch_size=8)
    Dinov2Model(config).save_pretrained(tmp_path/'base')
    study = replace(load_study(PLAN), data=str(drawn), size=64, val=.3, tiers=('lora','full'), models=(f"dinov2={tmp_path/'base'}",),
                    recipes={t:r|dict(epochs=1) for t,r in load_study(PLAN).recipes.items() if t in ('lora','full')})
    with ThreadPoolExecutor(1) as pool: opened = open_study(run_study(study, tmp_path, pool, device='cpu', progress=False))
    assert [*opened.of_kind().tier]==['frozen','lora','full']
    about = json.loads((opened.path/'dinov2-full-seed0'/'run.json').read_text())['spec']
    assert (about['n_prefix'], about['family'])==(1,'dinov2')

def test_statistics_that_a_folder_names(tmp_path):
    load_backbone('tiny-clip').model.save_pretrained(tmp_path)
    (tmp_path/'preprocessor_config.json').write_text(json.dumps(dict(image_mean=IMAGENET['mean'], image_std=IMAGENET['std'], size=96)))
    spec = load_backbone(tmp_path).spec
    assert (spec.mean, spec.std)==(IMAGENET['mean'], IMAGENET['std']) and load_backbone('tiny-clip').spec.mean!=spec.mean
