"Weights between two models: exact ends, a straight line, whole numbers left alone, LoRA by its scale, and the scores of a study along the way."
from copy import deepcopy
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from scipy import stats
from timm_models import timm_model
from ssl_wikichurches.attention.capture import pooled_maps
from ssl_wikichurches.backbones.encoders import load_backbone
from ssl_wikichurches.finetune.block_expansion import BlockExpansionRecipe, expand, fit_block_expansion
from ssl_wikichurches.data.churches import ChurchDataset, church_id, eval_transform
from ssl_wikichurches.study.runs import evaluate_maps
from ssl_wikichurches.finetune.training import StyleModel, classifier_state, load_classifier, new_classifier
from ssl_wikichurches.finetune.full import FullRecipe, fit_full
from ssl_wikichurches.finetune.linear import LinearRecipe, fit_linear
from ssl_wikichurches.finetune.lora import LoraRecipe, add_adapters, restore_lora
from ssl_wikichurches.attention.scores import image_iou, score_maps
from ssl_wikichurches.study.paths import ALPHAS, church_shift, interpolate, lora_path, path_scores, straight_path

TIMM = ('vit_base_patch16_dinov3','vit_base_patch16_siglip_224')
MODELS = ('tiny-dinov2','tiny-dinov3','tiny-mae','tiny-clip','tiny-siglip','tiny-supervised',*TIMM)
def backbone(name): return timm_model(name) if name in TIMM else load_backbone(name)
def same(a, b): return list(a)==list(b) and all(torch.equal(v, b[k]) for k,v in a.items())
def state(m): return {k:v.clone() for k,v in m.state_dict().items()}
def frozen(m): return m.eval().requires_grad_(False)
def images(b, n=2): return torch.rand(n, 3, *[b.spec.size]*2, generator=torch.Generator().manual_seed(1))

def shaken(model, seed=0, by=.02):
    "Another model of the same kind, as after a training."
    g,model = torch.Generator().manual_seed(seed),deepcopy(model)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=g), alpha=by)
    return model

def two(name):
    start = frozen(StyleModel(backbone(name), new_classifier(backbone(name).dim, 1)))
    return start,frozen(shaken(start))

# ---- a point on the line

numbers = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20)
@settings(max_examples=200, deadline=None)
@given(a=numbers, b=numbers, alpha=st.floats(0, 1))
def test_ends_and_the_identity_are_exact_and_the_line_is_straight(a, b, alpha):
    n = min(len(a), len(b))
    a,b = torch.tensor(a[:n]),torch.tensor(b[:n])
    at = lambda x, y, w: interpolate(dict(w=x), dict(w=y), w)['w']
    assert torch.equal(at(a, b, 0.), a) and torch.equal(at(a, b, 1.), b) and torch.equal(at(a, a, alpha), a)
    exact = a.double()+alpha*(b.double()-a.double())
    assert ((at(a, b, alpha).double()-exact).abs()<=3e-7*(a.double().abs()+b.double().abs())+1e-38).all()
    torch.testing.assert_close(at(a, b, .5), (a+b)/2, rtol=1e-6, atol=1e-6*(a.abs()+b.abs()).max().item())
    torch.testing.assert_close(at(a, b, alpha), (1-alpha)*a+alpha*b, rtol=1e-6, atol=1e-6*(a.abs()+b.abs()).max().item()) # as the authors write it

def test_what_is_no_weight_stays_and_what_differs_is_refused():
    a = dict(w=torch.rand(3), ids=torch.arange(4), on=torch.tensor(True), half=torch.rand(2).half())
    b = dict(w=torch.rand(3), ids=torch.arange(4), on=torch.tensor(True), half=torch.rand(2).half())
    mid = interpolate(a, b, .4)
    assert torch.equal(mid['ids'], a['ids']) and mid['ids'].dtype==torch.int64 and mid['on'].dtype==torch.bool and mid['half'].dtype==torch.half
    assert all(mid[k].data_ptr() not in (a[k].data_ptr(), b[k].data_ptr()) for k in a)
    for wrong,message in ((b|dict(ids=torch.arange(4)+1), 'whole numbers that differ'), (b|dict(on=torch.tensor(False)), 'whole numbers'), (b|dict(w=torch.rand(4)), 'another shape'),
                          ({k:v for k,v in b.items() if k!='w'}, 'missing'), (b|dict(more=torch.rand(1)), 'extra'), (b|dict(w=b['w'].double()), 'float64')):
        with pytest.raises(ValueError, match=message): interpolate(a, wrong, .5)
    for alpha in (-.1, 1.1, float('nan')):
        with pytest.raises(ValueError, match='0 to 1'): interpolate(a, b, alpha)

@pytest.mark.parametrize('name', MODELS)
def test_the_line_between_two_models(name):
    start,end = two(name)
    x = images(start.backbone)
    before,after = state(start),state(end)
    for alpha,m in straight_path(start, end):
        assert not m.training and not any(p.requires_grad for p in m.parameters())
        if alpha in (0,1):
            whole = (start,end)[int(alpha)]
            with torch.no_grad(): assert same(state(m), whole.state_dict()) and torch.equal(m(x), whole(x)) and torch.equal(pooled_maps(m.backbone, x), pooled_maps(whole.backbone, x))
        else:
            for k,v in m.state_dict().items():
                if v.is_floating_point(): torch.testing.assert_close(v.double(), (1-alpha)*before[k].double()+alpha*after[k].double(), rtol=1e-6, atol=1e-7)
                else: assert torch.equal(v, before[k])
    assert same(state(start), before) and same(state(end), after) # the ends stayed as they were
    for alpha,m in straight_path(start, start, (.1,.3,.7)): assert same(state(m), before)

def test_two_architectures_have_no_line():
    clip,mae = (frozen(StyleModel(load_backbone(n), new_classifier(96))) for n in ('tiny-clip','tiny-mae'))
    with pytest.raises(ValueError, match='not of the model at alpha 0'): next(straight_path(clip, mae))
    longer = frozen(StyleModel(expand(load_backbone('tiny-clip'), 2), new_classifier(96)))
    with pytest.raises(ValueError, match='not of the model at alpha 0'): next(straight_path(clip, longer))

# ---- LoRA

def adapters(name, recipe, seed=0):
    "State of a run, with adapters that do something."
    b = backbone(name); add_adapters(b, recipe, seed)
    g = torch.Generator().manual_seed(seed)
    found = {f'adapter.{k}':torch.randn(v.shape, generator=g)*.05 if 'lora_B' in k else v.clone() for k,v in get_peft_model_state_dict(b.model).items()}
    return found|classifier_state(new_classifier(b.dim, 7))

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('more', ({}, dict(rslora=True,rank=4), dict(targets='qkv',alpha=5.)), ids=('plain','rslora','qkv'))
def test_scaling_the_adapters_is_the_line_to_the_merged_model(name, more):
    recipe = LoraRecipe(**more)
    run = adapters(name, recipe)
    start = frozen(StyleModel(backbone(name), new_classifier(backbone(name).dim, 1)))
    before,x = state(start),images(start.backbone)
    end = frozen(StyleModel(restore_lora(backbone(name), recipe, run), load_classifier(run)))
    for (alpha,m),(_,line) in zip(lora_path(start, recipe, run), straight_path(start, end)):
        a,b = state(m),state(line)
        assert list(a)==list(b) and max((a[k]-b[k]).abs().max().item() for k in a if a[k].is_floating_point())<2e-7 # 6e-8 seen
        if alpha in (0,1):
            assert same(a, b) and same(a, (start,end)[int(alpha)].state_dict())
            with torch.no_grad(): assert torch.equal(m(x), (start,end)[int(alpha)](x))
        else:
            with torch.no_grad(): torch.testing.assert_close(m(x), line(x), atol=1e-5, rtol=1e-5)
            assert not same(a, before)
    assert same(state(start), before)

@pytest.mark.parametrize('alpha', (.25,.5,.9))
def test_scaled_adapters_before_they_are_merged(alpha):
    "By peft's own scaling of a layer, on a model that still carries its adapters."
    recipe = LoraRecipe(); run = adapters('tiny-clip', recipe)
    b = load_backbone('tiny-clip'); add_adapters(b, recipe)
    set_peft_model_state_dict(b.model, {k.removeprefix('adapter.'):v for k,v in run.items() if k.startswith('adapter.')})
    for m in b.modules():
        if isinstance(m, LoraLayer): m.set_scale('default', alpha)
    start = frozen(StyleModel(load_backbone('tiny-clip'), new_classifier(96)))
    (_,m), = lora_path(start, recipe, run, (alpha,))
    x = images(b)
    with torch.no_grad(): torch.testing.assert_close(m.backbone(x), frozen(b)(x), atol=1e-4, rtol=1e-4)

def test_dora_has_no_such_line_and_its_merged_weights_have_one():
    recipe = LoraRecipe(dora=True)
    run = adapters('tiny-clip', recipe)
    start = frozen(StyleModel(load_backbone('tiny-clip'), new_classifier(96)))
    with pytest.raises(ValueError, match='DoRA'): next(lora_path(start, recipe, run))
    end = frozen(StyleModel(restore_lora(load_backbone('tiny-clip'), recipe, run), load_classifier(run)))
    assert len([*straight_path(start, end)])==len(ALPHAS)

# ---- scores along the line

def test_scores_at_the_ends_are_those_of_a_study(data):
    "By the functions that score a run: accuracy of Fitted, IoU of what `evaluate_maps` gives."
    probe = fit_linear(load_backbone('tiny-clip'), data, LinearRecipe(solver='logistic'))
    full = fit_full(load_backbone('tiny-clip'), data, FullRecipe(epochs=1, batch=30, lr=1e-3, backbone_lr=5e-4))
    start,end = (StyleModel(f.backbone, f.classifier) for f in (probe, full))
    table = path_scores(straight_path(start, end, (0.,.5,1.)), data)
    iou = {}
    for alpha,f in ((0.,probe), (1.,full)):
        stored,boxes = evaluate_maps(f.backbone, data)
        scores = score_maps(stored.maps, boxes, [*stored.images], 96, [church_id(n) for n in stored.images]).query("metric=='iou@90' and head=='mean' and block==3")
        iou[alpha] = scores.set_index('image').value
        pd.testing.assert_series_equal(image_iou(f.backbone, ChurchDataset(data.churches, data.split.eval, eval_transform(data.size, data.geometry))), iou[alpha], check_exact=True)
        assert table.loc[alpha, ['accuracy','balanced_accuracy','macro_f1']].to_dict()==pytest.approx(f.scores(data.loader('val')))
        assert table.loc[alpha,'iou']==pytest.approx(iou[alpha].mean(), abs=1e-12) # a photograph for each church
    d = (iou[1.]-iou[0.]).to_numpy()
    low,high = stats.t.interval(.95, len(d)-1, d.mean(), stats.sem(d))
    assert table.loc[1.,['delta','low','high']].tolist()==pytest.approx([d.mean(), low, high], abs=1e-12)
    assert table.loc[0.,['delta','low','high']].tolist()==[0,0,0] and set(table.churches)=={len(d)}
    assert table.loc[.5,'delta']!=0

def test_churches_count_once(data):
    "Images of a church are averaged before churches are."
    names = ['Q1_wd0.jpg','Q1_wd1.jpg','Q2_wd0.jpg','Q3_wd0.jpg']
    before,after = pd.Series([.1,.3,.2,.4], names),pd.Series([.2,.6,.2,.3], names)
    found = church_shift(before, after, [church_id(n) for n in before.index])
    d = np.array([.2,0.,-.1])
    low,high = stats.t.interval(.95, 2, d.mean(), stats.sem(d))
    assert found==pytest.approx(dict(iou=np.mean([.4,.2,.3]), delta=d.mean(), low=low, high=high, churches=3))
    with pytest.raises(ValueError, match='at least 2'): church_shift(before[:2], after[:2], ['Q1','Q1'])

def test_percentile_part_and_refusals(data):
    start,end = two('tiny-siglip')
    a,b = (path_scores(straight_path(start, end, (0.,1.)), data, part, q) for part,q in (('val',90), ('eval',80)))
    assert (a.iou!=b.iou).all() and not a.accuracy.equals(b.accuracy)
    with pytest.raises(ValueError, match='begins at alpha 0.5'): path_scores(straight_path(start, end, (.5,1.)), data)
    with pytest.raises(ValueError, match='no points'): path_scores(iter(()), data)

def test_block_expansion_has_a_line_from_its_silent_start(data):
    recipe = BlockExpansionRecipe(epochs=1, batch=30, lr=1e-3, every=2)
    f = fit_block_expansion(load_backbone('tiny-clip'), data, recipe)
    start = frozen(StyleModel(expand(load_backbone('tiny-clip'), 2), new_classifier(96)))
    plain = frozen(load_backbone('tiny-clip'))
    for alpha,m in straight_path(start, frozen(StyleModel(f.backbone, f.classifier))):
        x = images(m.backbone)
        maps = pooled_maps(m.backbone, x)
        assert m.backbone.measured==(0,1,3,4) and torch.equal(maps[:,:2], pooled_maps(plain, x)[:,:2]) and torch.equal(maps, pooled_maps(plain, x))==(alpha==0)
