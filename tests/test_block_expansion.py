"Block expansion: the identity at first, original weights for ever, original maps block by block, and nothing left behind."
from dataclasses import asdict, replace
import copy, json
from concurrent.futures import ThreadPoolExecutor
import pytest, timm, torch
from torch import nn
from timm_models import timm_model
from small import SIDE, load_backbone
from ssl_wikichurches.backbones import encoders as backbones
from ssl_wikichurches.attention.capture import artifact_patches, capture_attention, maps_and_prefix, pooled_maps, received_maps
from ssl_wikichurches.backbones.encoders import TINY, save_backbone
from ssl_wikichurches.finetune.block_expansion import (BlockExpansionRecipe, added_blocks, added_maps, block_mapping, block_state, branch_ends, collapse, expand, fit_block_expansion,
                                              identity_copy, restore_block_expansion)
from ssl_wikichurches.data.files import read_tensors, write_tensors
from ssl_wikichurches.data.download import load_churches
from ssl_wikichurches.study.plan import Study
from ssl_wikichurches.study.runs import evaluate_maps, run_study
from ssl_wikichurches.finetune.training import StyleModel, TrainData, make_recipe, new_classifier
from ssl_wikichurches.finetune.lora import LoraRecipe, add_adapters
from ssl_wikichurches.attention.maps import compute_maps, load_maps
from ssl_wikichurches.data.splits import load_split

TIMM = ('vit_base_patch16_dinov3','vit_base_patch16_siglip_224','vit_base_patch14_reg4_dinov2','deit3_small_patch16_224','eva02_base_patch14_224','beit_base_patch16_224')
MODELS = (*TINY,*TIMM)
def model(name): return (timm_model(name) if name in TIMM else load_backbone(name)).requires_grad_(False)
def every_of(b): return b.depth//2 if b.depth%2==0 else 1 # two new blocks of a toy, three of timm's
def images(b, n=2): return torch.rand(n, 3, *[b.spec.size]*2, generator=torch.Generator().manual_seed(1))
@pytest.fixture(scope='module')
def data(two_dozen): return two_dozen

def same(a, b): return list(a)==list(b) and all(torch.equal(v, b[k]) for k,v in a.items())
def state(b): return {k:v.clone() for k,v in b.state_dict().items()}
def silent(b):
    "No weight asks for a gradient, as in every measurement."
    return b.requires_grad_(False)

def shaken(b, seed=0):
    "New blocks that do something, as after a training."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for i in added_blocks(b):
            for p in b.layers[i].parameters(): p.add_(torch.randn(p.shape, generator=g), alpha=.05)
    return b

def slow(b, x):
    "Rows of all blocks that run, by the library's own eager attention; rows (batch, heads, tokens) in their order."
    seen = []
    real = torch.softmax if b.spec.family=='timm' else nn.functional.softmax
    def softmax(*args, **kwargs):
        out = real(*args, **kwargs)
        if out.ndim==4: seen.append(out[:,:,0].float())
        return out
    with pytest.MonkeyPatch.context() as m, torch.no_grad():
        m.setattr(nn.functional, 'softmax', softmax)
        b.model.set_attn_implementation('eager')
        b(x)
        b.model.set_attn_implementation('sdpa')
    return seen

# ---- at the start

@pytest.mark.parametrize('name', MODELS)
def test_it_starts_as_the_same_model(name):
    b = model(name); x = images(b)
    with torch.no_grad(): was = b(x),b.patches(x),b.blocks(x),*maps_and_prefix(b, x),received_maps(b, x),artifact_patches(b, x)
    n,every = b.depth,every_of(b)
    head = new_classifier(b.dim)
    logits = head(was[0])
    assert expand(b, every) is b and b.depth==n+n//every and len(b.layers)==b.depth and not b.training
    silent(b)
    with torch.no_grad(): now = b(x),b.patches(x),b.blocks(x),*maps_and_prefix(b, x),received_maps(b, x),artifact_patches(b, x)
    assert all(torch.equal(u, v) for u,v in zip(was, now))
    assert (StyleModel(b, head)(x)-logits).abs().max().item()==0.

@pytest.mark.parametrize('name', MODELS)
def test_only_what_was_zeroed_has_a_gradient_at_first(name):
    b = model(name)
    expand(b, every_of(b))
    m = StyleModel(b, new_classifier(b.dim))
    zeroed = {f'backbone.model.{k}.{end}.{p}' for i in added_blocks(b) for k in [next(n for n,u in b.model.named_modules() if u is b.layers[i])] for end in branch_ends(b.layers[i])
              for p,_ in b.layers[i].get_submodule(end).named_parameters()}
    named = dict(m.named_parameters())
    assert zeroed<=set(named) and all(not named[k].any() for k in zeroed)
    nn.functional.cross_entropy(m(images(b)), torch.tensor([0,1])).backward()
    for k,p in named.items():
        if k.startswith('classifier.') or k in zeroed: assert p.grad.abs().max()>0, k
        elif p.requires_grad: assert p.grad is None or not p.grad.any(), k
        else: assert p.grad is None, k
    assert {k for k,p in named.items() if p.requires_grad and 'classifier' not in k}=={f'backbone.{k}' for k,p in b.named_parameters() if any(p is q for i in added_blocks(b) for q in b.layers[i].parameters())}

def test_zeroing_the_scale_as_well_would_be_dead():
    "Why never both: no weight of such a branch has a gradient."
    b = expand(model('tiny-dinov2'), 4)
    with torch.no_grad():
        for s in ('layer_scale1','layer_scale2'): b.layers[4].get_submodule(s).lambda1.zero_()
    nn.functional.cross_entropy(StyleModel(b, new_classifier(b.dim))(images(b)), torch.tensor([0,1])).backward()
    assert all(p.grad is None or not p.grad.any() for p in b.layers[4].parameters())
    with pytest.raises(ValueError, match='lambda1 .* is zero'): identity_copy(b.layers[4])

@pytest.mark.parametrize('name', MODELS)
def test_copies_share_nothing_but_the_config(name):
    b = model(name)
    old = b.layers
    expand(b, every_of(b))
    for i in added_blocks(b):
        twin,origin = b.layers[i],b.layers[i-1]
        assert origin is old[block_mapping(b)[i-1]]
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in b.parameters() if not p.requires_grad}
        ends = [f'{e}.{k}' for e in branch_ends(twin) for k in ('weight','bias')]
        for k,v in twin.state_dict().items(): assert not v.any() if k in ends else torch.equal(v, origin.state_dict()[k]), k
        assert all(u.config is v.config for u,v in zip(twin.modules(), origin.modules()) if hasattr(u, 'config'))

def test_dropping_weights_of_a_branch_is_not_the_identity_where_the_authors_names_are_used():
    "The published script zeroes names with `output`; DINOv2's second map is fc2."
    block = model('tiny-dinov2').layers[0]
    twin = copy.deepcopy(block)
    for p in twin.attention.o_proj.parameters(): nn.init.zeros_(p)
    x = torch.randn(1, 149, 96, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(twin(x), x, atol=1e-3) and torch.equal(identity_copy(block)(x), x)

# ---- places

@pytest.mark.parametrize('depth,every,measured', [(12,4,(0,1,2,3,5,6,7,8,10,11,12,13)), (12,12,tuple(range(12))), (12,6,(0,1,2,3,4,5,7,8,9,10,11,12)), (12,3,(0,1,2,4,5,6,8,9,10,12,13,14)), (4,1,(0,2,4,6))])
def test_places(depth, every, measured):
    options = dict(depth=depth, embed_dim=32, num_heads=2, img_size=32, patch_size=16)
    net = backbones.build_timm('vit_tiny_patch16_224', **options)
    b = backbones.load_timm('vit_tiny_patch16_224', lambda m: net.state_dict(), 'x', options).eval()
    expand(b, every)
    assert b.measured==measured and b.depth==depth+depth//every
    mapping = block_mapping(b)
    assert [k for k in mapping if k is not None]==list(range(depth)) and added_blocks(b)==[i for i,k in enumerate(mapping) if k is None]
    if (depth,every)==(12,4): assert added_blocks(b)==[4,9,14] # 5, 10 and 15 counted from 1: after blocks 4, 8 and 12
    assert block_state(b)['mapping'].tolist()==[-1 if k is None else k for k in mapping]

@pytest.mark.parametrize('name', ('tiny-dinov2','tiny-dinov3','tiny-mae','tiny-clip','tiny-siglip','vit_base_patch16_dinov3'))
def test_measured_are_the_original_blocks_of_the_longer_model(name):
    "Trained or not: maps by number are those of the calls that original blocks made, and the new ones are apart."
    b = model(name); x,every = images(b),every_of(b)
    start = pooled_maps(b, x) if b.spec.pooling=='class' else received_maps(b, x)
    expand(b, every); fresh = added_maps(b, x)
    silent(shaken(b))
    read = received_maps if b.spec.pooling=='head' else pooled_maps
    with torch.no_grad(), capture_attention(full=True) as seen: b(x)
    n,g = b.spec.n_prefix,b.spec.grid
    rows = [(r.weights[:,:,0] if b.spec.pooling=='class' else r.weights[:,:,n:].mean(2))[...,n:].unflatten(-1, (g,g)).float() for r in seen.records[:b.depth]]
    maps,new = read(b, x),added_maps(b, x)
    for i,k in enumerate(block_mapping(b)):
        torch.testing.assert_close(maps[:,k] if k is not None else new[:,added_blocks(b).index(i)], rows[i], atol=1e-6, rtol=1e-5)
    first = every # blocks before the first new one see what they always saw
    assert torch.equal(maps[:,:first], start[:,:first]) and not torch.allclose(maps[:,first:], start[:,first:], atol=1e-5)
    assert fresh.shape==new.shape and not torch.allclose(fresh, new, atol=1e-5)
    assert b.measured==tuple(i for i,k in enumerate(block_mapping(b)) if k is not None) # the view left it alone
    stored = compute_maps(b, ['a','b'], x)
    assert torch.equal(stored.maps if b.spec.pooling=='class' else stored.received, maps.half())
    if b.spec.pooling=='head':
        assert stored.maps.shape[1]==1
        torch.testing.assert_close(stored.maps[:,0].float(), seen.records[-1].weights[:,:,0].unflatten(-1, (g,g)), atol=1e-4, rtol=2e-3)

@pytest.mark.parametrize('name', ('tiny-dinov2','tiny-dinov3','tiny-mae','tiny-clip'))
def test_slow_attention_is_the_judge(name):
    "Rows of all blocks of the longer model by the library's own eager attention: the copies follow the model's setting."
    b = silent(shaken(expand(model(name), 2))); x = images(b)
    rows,n,g = slow(b, x),b.spec.n_prefix,b.spec.grid
    assert len(rows)==b.depth
    want = lambda blocks: torch.stack([rows[i][...,n:].unflatten(-1, (g,g)) for i in blocks], 1)
    torch.testing.assert_close(pooled_maps(b, x), want(b.measured), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(added_maps(b, x), want(added_blocks(b)), atol=1e-6, rtol=1e-5)

def test_blocks_are_those_that_ran(monkeypatch):
    "Features after original blocks, by hooks."
    for name in ('tiny-clip','tiny-dinov3','tiny-supervised'):
        b = silent(shaken(expand(model(name), 2))); x = images(b); out = []
        hooks = [m.register_forward_hook(lambda m,a,o: out.append(o[0] if isinstance(o, tuple) else o)) for m in b.layers]
        with torch.no_grad(): b(x)
        for h in hooks: h.remove()
        with torch.no_grad(): found = b.blocks(x)
        assert found.shape[1]==4 and len(out)==6
        for k,i in enumerate(b.measured): torch.testing.assert_close(found[:,k], out[i][:,b.spec.n_prefix:])

def test_twelve_real_blocks(real):
    "A ViT-Tiny trained on ImageNet, as the paper expands it: copies after blocks 4, 8 and 12, a quarter more weights in blocks."
    b = silent(load_backbone(f"timm/vit_tiny_patch16_224@{real/'vit_tiny_in1k/model.safetensors'}")); x = images(b)
    with torch.no_grad(): feature,maps = b(x),pooled_maps(b, x)
    n = sum(p.numel() for m in b.layers for p in m.parameters())
    expand(b)
    assert added_blocks(b)==[4,9,14] and 4*sum(p.numel() for p in b.parameters() if p.requires_grad)==n
    silent(b)
    with torch.no_grad(): assert torch.equal(b(x), feature) and torch.equal(pooled_maps(b, x), maps)
    silent(shaken(b))
    with torch.no_grad(): assert torch.equal(pooled_maps(b, x)[:,:4], maps[:,:4]) and not torch.equal(pooled_maps(b, x)[:,4:], maps[:,4:])

# ---- back

@pytest.mark.parametrize('name', MODELS)
def test_without_the_new_blocks_it_is_the_frozen_model(name):
    b = model(name); x = images(b)
    before,types = state(b),[type(m).__name__ for m in b.modules()]
    with torch.no_grad(): was = b(x),maps_and_prefix(b, x)[0],b.blocks(x)
    silent(shaken(expand(b, every_of(b))))
    with torch.no_grad(): assert not torch.equal(b(x), was[0])
    assert collapse(b) is b and same(state(b), before) and [type(m).__name__ for m in b.modules()]==types
    with torch.no_grad(): assert torch.equal(b(x), was[0]) and torch.equal(maps_and_prefix(b, x)[0], was[1]) and torch.equal(b.blocks(x), was[2])
    assert block_mapping(b)==list(range(b.depth)) and added_blocks(b)==[]

def test_a_collapsed_backbone_is_saved_and_an_expanded_one_is_not(tmp_path):
    b = expand(model('tiny-clip'), 2); x = images(b)
    with pytest.raises(ValueError, match='4 of its 6 blocks'): save_backbone(b, tmp_path/'long')
    assert not (tmp_path/'long').exists()
    save_backbone(collapse(b), tmp_path/'short')
    with torch.no_grad(): assert torch.equal(silent(load_backbone(tmp_path/'short'))(x), model('tiny-clip')(x))

# ---- what cannot be done

def test_refused():
    with pytest.raises(ValueError, match='divisor of the 4 blocks'): expand(model('tiny-mae'), 3)
    with pytest.raises(ValueError, match='divisor of the 4 blocks'): expand(model('tiny-mae'), 8)
    with pytest.raises(ValueError, match='divisor'): expand(model('tiny-mae'), 0)
    with pytest.raises(ValueError, match='expanded before'): expand(expand(model('tiny-mae'), 4), 5)
    b = model('tiny-clip'); add_adapters(b, LoraRecipe())
    with pytest.raises(ValueError, match='adapters'): expand(b, 2)

def test_blocks_that_do_more_than_add_are_refused_and_left_alone():
    "A norm after the branch has a bias of its own, so a silent branch is not nothing."
    options = dict(depth=2, embed_dim=32, num_heads=2, img_size=32, patch_size=16, block_fn=timm.models.vision_transformer.ResPostBlock)
    net = backbones.build_timm('vit_tiny_patch16_224', **options)
    with torch.no_grad():
        for m in net.blocks: m.norm1.bias.fill_(.3)
    b = backbones.load_timm('vit_tiny_patch16_224', lambda m: net.state_dict(), 'x', options).eval()
    before = state(b)
    with pytest.raises(ValueError, match='more than add two branches'): expand(b, 1)
    assert same(state(b), before) and b.depth==2 and b.measured==(0,1)

@pytest.mark.parametrize('block', ('ParallelScalingBlock','ParallelThingsBlock'))
def test_blocks_of_another_build_are_refused(block):
    built = getattr(timm.models.vision_transformer, block)(32, 2)
    with pytest.raises(ValueError, match='expected one linear map'): branch_ends(built)
    with pytest.raises(ValueError, match='expected one linear map'): identity_copy(built)

def test_rotations_of_every_block_are_refused():
    options = dict(depth=2, embed_dim=64, num_heads=2, img_size=64, patch_size=16)
    net = backbones.build_timm('vit_small_patch16_rope_mixed_224', **options)
    b = backbones.load_timm('vit_small_patch16_rope_mixed_224', lambda m: net.state_dict(), 'x', options).eval()
    with pytest.raises(ValueError, match='rotations for each'): expand(b, 1)

# ---- training

SHORT = BlockExpansionRecipe(epochs=2, batch=30, lr=1e-3, every=2)

@pytest.mark.parametrize('name', ('tiny-clip','tiny-siglip','tiny-dinov2','vit_base_patch16_dinov3'))
def test_training_changes_new_blocks_alone_and_can_be_restored(name, data, tmp_path):
    b = model(name); d = replace(data, size=b.spec.size); x,before = images(b),state(b)
    recipe = replace(SHORT, every=every_of(b))
    f = fit_block_expansion(b, d, recipe, seed=3)
    assert f.backbone is b and f.n_trainable==sum(p.numel() for i in added_blocks(b) for p in b.layers[i].parameters())+4*b.dim+4
    assert set(f.state)=={f'block.{i}.{k}' for i in added_blocks(b) for k in b.layers[i].state_dict()}|{'mapping','classifier.weight','classifier.bias'}
    for i in added_blocks(b):
        origin = b.layers[i-1].state_dict()
        for e in branch_ends(b.layers[i]): assert f.state[f'block.{i}.{e}.weight'].any()
        assert any(not torch.equal(f.state[f'block.{i}.{k}'], v) for k,v in origin.items() if not k.startswith(tuple(branch_ends(b.layers[i]))))
    silent(b)
    with torch.no_grad(): trained = b(x),maps_and_prefix(b, x)[0],added_maps(b, x)
    again = silent(restore_block_expansion(model(name), recipe, read_tensors(write_tensors(tmp_path/'model.safetensors', f.state))[0]))
    with torch.no_grad(): assert torch.equal(again(x), trained[0]) and torch.equal(maps_and_prefix(again, x)[0], trained[1]) and torch.equal(added_maps(again, x), trained[2])
    assert same(state(collapse(b)), before)
    with torch.no_grad(): assert torch.equal(b(x), model(name)(x))

def test_restoring_refuses_other_tensors(data):
    f = fit_block_expansion(model('tiny-clip'), data, replace(SHORT, epochs=1))
    with pytest.raises(ValueError, match='after every 4'): restore_block_expansion(model('tiny-clip'), replace(SHORT, every=4), f.state)
    with pytest.raises(ValueError, match='not of tiny-dinov3'): restore_block_expansion(model('tiny-dinov3'), SHORT, f.state)
    wrong = f.state|dict(mapping=torch.tensor([0,-1,1,2,-1,3]))
    with pytest.raises(ValueError, match='stored for the order'): restore_block_expansion(model('tiny-clip'), SHORT, wrong)

@pytest.mark.parametrize('name', ('tiny-clip','vit_base_patch16_dinov3'))
def test_a_rate_of_zero_moves_nothing(name, data):
    b = model(name); x = images(b)
    with torch.no_grad(): was = b(x),pooled_maps(b, x)
    silent(fit_block_expansion(b, replace(data, size=b.spec.size), replace(SHORT, epochs=1, lr=0., every=every_of(b))).backbone)
    with torch.no_grad(): assert torch.equal(b(x), was[0]) and torch.equal(pooled_maps(b, x), was[1])

def test_permuting_a_batch_permutes_features():
    b = silent(shaken(expand(model('tiny-siglip'), 2))); x = images(b, 4)
    order = torch.tensor([2,0,3,1])
    with torch.no_grad(): torch.testing.assert_close(b(x)[order], b(x[order]), atol=1e-6, rtol=1e-5)

@pytest.mark.parametrize('name', ('tiny-clip','tiny-siglip'))
def test_in_a_study_block_k_is_block_k(name, tmp_path, drawn):
    "The study's own functions know nothing of new blocks, and the run's tensors rebuild what was measured."
    study = Study('expanded', str(drawn), (name,), ('block_expansion',), size=64, val=.3, recipes=dict(block_expansion=dict(epochs=1, lr=1e-3, every=2)))
    with ThreadPoolExecutor(1) as pool: root = run_study(study, tmp_path, pool, device='cpu', progress=False)
    before,after = (load_maps(root/f'{name}-{t}') for t in ('frozen','block_expansion-seed0'))
    assert before.maps.shape==after.maps.shape and before.received.shape==after.received.shape
    blocks = lambda m: m.received if name=='tiny-siglip' else m.maps
    assert torch.equal(blocks(before)[:,:2], blocks(after)[:,:2]) and not torch.equal(blocks(before)[:,2:], blocks(after)[:,2:])
    run = json.loads((root/f'{name}-block_expansion-seed0'/'recipe.json').read_text())
    again = restore_block_expansion(load_backbone(name), BlockExpansionRecipe(**run['recipe']), read_tensors(root/f'{name}-block_expansion-seed0'/'model.safetensors')[0])
    stored,_ = evaluate_maps(again, TrainData(load_churches(str(drawn)), load_split(root/'split.json'), 64))
    assert torch.equal(stored.maps.float(), after.maps)

def test_recipe_round_trips():
    r = BlockExpansionRecipe(every=6, lr=.01)
    assert BlockExpansionRecipe(**json.loads(json.dumps(asdict(r))))==r and make_recipe(BlockExpansionRecipe, every=6, lr=.01)==r
    assert BlockExpansionRecipe().weight_decay==0.
