"Captured attention against independent oracles, and what capturing must leave alone."
import gc, math
from dataclasses import replace
import peft, pytest, timm, torch, torchvision
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig
from timm_models import timm_model
from ssl_wikichurches.backbones import encoders as backbones
from ssl_wikichurches.attention.capture import (AttentionCall, artifact_patches, attention_weights, capture_attention, fuse_heads, maps_and_prefix, mask_patches,
                                        pooled_maps, prefix_mass, read_pooled, received_maps, regrid)
from ssl_wikichurches.backbones.encoders import BACKBONES, TINY, Backbone, load_backbone

HUGGING = [k for k in TINY if k!='tiny-supervised']
TOLERANCE = 1e-6

def images(size=96, n=2, seed=0): return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))

def vit_b(name, sharpen=1., depth=12):
    "The family at ViT-B size, of so many blocks, random weights; queries and keys are scaled up to make attention less even."
    spec = BACKBONES[name]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        if spec.family=='timm': recipe = dict(library='timm', architecture='vit_base_patch16_224', options=dict(depth=depth))
        else:
            more = dict(num_register_tokens=4) if spec.n_prefix==5 else {}
            recipe = backbones.transformers_architecture(AutoConfig.for_model(backbones.FAMILIES[spec.family].types[0], hidden_size=768, num_hidden_layers=depth, num_attention_heads=12,
                                                               intermediate_size=3072, image_size=518 if name=='dinov2' else 224, patch_size=spec.patch, **more))
        b = Backbone(spec, backbones.build_architecture(recipe), recipe).eval()
    with torch.no_grad():
        for block in backbones.attention_projections(b):
            for k in ('q','k','qkv'):
                if k in block: b.model.get_submodule(block[k]).weight[:2*b.dim].mul_(sharpen)
    return b

@torch.no_grad()
def eager_rows(b, x):
    "All blocks' matrices from the library's own slow attention."
    inputs = dict(noise=torch.arange(float(b.spec.grid**2)).expand(len(x),-1)) if b.spec.family=='mae' else {}
    b.model.set_attn_implementation('eager')
    try: return b.model((x-b.mean)/b.std, output_attentions=True, **inputs).attentions
    finally: b.model.set_attn_implementation('sdpa')

@torch.no_grad()
def eager_rows_of_same_inputs(b, x):
    "Every block's slow attention, given what the block received in a fused forward pass: no rounding is carried from block to block."
    seen = []
    layers = [b.model.get_submodule(block['q'].rpartition('.')[0]) for block in backbones.attention_projections(b)]
    hooks = [m.register_forward_pre_hook(lambda m,args,kwargs: seen.append((m,args,kwargs)), with_kwargs=True) for m in layers]
    b(x)
    for h in hooks: h.remove()
    b.model.set_attn_implementation('eager')
    try: return [m(*args, **kwargs)[1] for m,args,kwargs in seen]
    finally: b.model.set_attn_implementation('sdpa')

@torch.no_grad()
def head_row(b, x):
    "The pooling head's weights from nn.MultiheadAttention itself."
    tokens = b.model((x-b.mean)/b.std).last_hidden_state; head = b.model.head
    return head.attention(head.probe.repeat(len(x),1,1), tokens, tokens, average_attn_weights=False)[1]

@torch.no_grad()
def timm_rows(b, x):
    "All blocks' matrices of a timm model, from queries and keys made by hand."
    seen = {}
    hooks = [m.register_forward_hook(lambda m,i,o,j=j: seen.__setitem__(j, o)) for j,m in enumerate(blk.attn.qkv for blk in b.model.blocks)]
    b(x)
    for h in hooks: h.remove()
    rows = []
    for j in range(b.depth):
        q,k,_ = seen[j].unflatten(-1, (3, b.n_heads, -1)).permute(2,0,3,1,4)
        rows.append(((q@k.transpose(-2,-1))*q.shape[-1]**-.5).softmax(-1))
    return rows

def check(b, x, tolerance=TOLERANCE, eager=eager_rows):
    "Largest differences of class rows (or head row) and of full matrices; features are equal to the last bit."
    with torch.no_grad():
        plain = b(x)
        with capture_attention() as seen: watched = b(x)
        again = b(x)
        with capture_attention(full=True) as whole: full = b(x)
    assert torch.equal(plain, watched) and torch.equal(plain, again)
    torch.testing.assert_close(full, plain, atol=1e-4, rtol=1e-4)
    oracle = timm_rows(b, x) if b.spec.family=='timm' else eager(b, x)
    assert len(oracle)==b.depth and len(seen.records)==len(whole.records)==b.depth+(b.spec.pooling=='head')
    gaps = [(r.weights[:,:,:1]-o[:,:,:1]).abs().max().item() for r,o in zip(seen.records, oracle)]
    gaps += [(r.weights-o).abs().max().item() for r,o in zip(whole.records, oracle)]
    for r in whole.records: assert (r.weights.sum(-1)-1).abs().max()<=1e-5
    maps = pooled_maps(b, x); g = b.spec.grid
    if b.spec.pooling=='head':
        row = head_row(b, x)
        gaps.append((maps[:,0].flatten(-2)-row[:,:,0]).abs().max().item())
        assert maps.shape==(len(x), 1, b.n_heads, g, g)
    else:
        wanted = torch.stack([o[:,:,0,b.spec.n_prefix:] for o in oracle], 1).unflatten(-1, (g,g))
        gaps.append((maps-wanted).abs().max().item())
        assert maps.shape==(len(x), b.depth, b.n_heads, g, g)
    assert maps.dtype==torch.float32 and not maps.requires_grad
    print(f'{b.spec.name}: largest difference {max(gaps):.1e}, largest weight {max(o.max().item() for o in oracle):.2f}')
    assert max(gaps)<=tolerance

# ---- against the libraries' own weights

@pytest.mark.parametrize('name', TINY)
def test_equals_eager_tiny(name): check(load_backbone(name), images())

@pytest.mark.parametrize('name', [k for k in BACKBONES if not k.startswith('tiny-')])
def test_equals_eager_vit_b(name):
    "At ViT-B width, and once at full depth, with a pooling head; random weights as they are drawn."
    check(vit_b(name, depth=12 if name=='siglip' else 3), images(224, 1)); gc.collect()

@pytest.mark.parametrize('name', [k for k in BACKBONES if not k.startswith('tiny-')])
def test_equals_eager_vit_b_when_attention_is_sharp(name):
    """With attention that is far from even, which magnifies rounding from block to block: so in double precision, and each block
    against slow attention on the same input (some families round their slow softmax to float32)."""
    check(vit_b(name, sharpen=4., depth=2).double(), images(224, 1).double(), eager=eager_rows_of_same_inputs); gc.collect()

@pytest.mark.parametrize('name', ('tiny-mae', 'tiny-dinov3', 'tiny-siglip'))
def test_other_input_size(name):
    b = load_backbone(name, size=64)
    assert pooled_maps(b, images(64)).shape[-2:]==(8,8)

def test_feature_is_untouched_while_training_too():
    "Gradients asked for: the fused kernel may be another one, but it is the same with and without capture."
    for name in TINY:
        b = load_backbone(name).train()
        plain = b(images())
        with capture_attention(): assert torch.equal(b(images()), plain)

def test_timm_families():
    x = images(64)
    for architecture,n in (('vit_base_patch16_dinov3', 5), ('vit_base_patch16_siglip_224', 0), ('vit_base_patch14_reg4_dinov2', 5)):
        options = dict(depth=2, embed_dim=96, num_heads=4, img_size=64, patch_size=16)
        model = backbones.build_timm(architecture, **options)
        b = backbones.load_timm(architecture, lambda m: model.state_dict(), 'x', options).eval()
        assert b.spec.n_prefix==n
        maps = pooled_maps(b, x)
        assert maps.shape==((2,1,4,4,4) if n==0 else (2,2,4,4,4))
        slow = load_slow(architecture, options, model)
        with torch.no_grad():
            seen = []
            hooks = [m.register_forward_hook(lambda m,i,o: seen.append(i[0])) for n_,m in slow.named_modules() if n_.endswith('attn_drop') or n_=='attn_pool.attn_drop']
            slow((x-b.mean)/b.std)
        if seen:
            rows = seen[-1:] if n==0 and len(seen)==3 else seen[:2]
            if not (n==0 and len(seen)<3):
                assert (maps.flatten(-2)-torch.stack([r[:,:,0,n:] for r in rows], 1)).abs().max()<=TOLERANCE

def load_slow(architecture, options, model):
    "timm's own unfused attention, with the same weights."
    timm.layers.set_fused_attn(False)
    try: slow = backbones.build_timm(architecture, **options)
    finally: timm.layers.set_fused_attn(True)
    slow.load_state_dict(model.state_dict())
    return slow.eval()

def test_torchvision():
    "Another library: nn.MultiheadAttention with itself, whose native fast path gives way inside the context."
    model = torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64).eval()
    with torch.no_grad():
        plain = model(images(32))
        with capture_attention() as seen: watched = model(images(32))
    torch.testing.assert_close(watched, plain, atol=1e-6, rtol=1e-5)
    assert [r.weights.shape for r in seen.records]==[(2,4,1,17)]*2 and {r.kind for r in seen.records}=={'mha'}

# ---- adapters

@pytest.mark.parametrize('name', TINY)
def test_peft_wrapped(name):
    frozen = load_backbone(name).requires_grad_(False); before = pooled_maps(frozen, images())
    b = load_backbone(name).requires_grad_(False)
    targets = [n for block in backbones.attention_projections(b) for k,n in block.items() if k!='k']
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        b.model = peft.get_peft_model(b.model, peft.LoraConfig(target_modules=targets, r=4, lora_dropout=.1)); b.eval()
    assert torch.equal(pooled_maps(b, images()), before)
    with torch.no_grad():
        for n,p in b.named_parameters():
            if 'lora_B' in n: p.normal_(std=.3, generator=torch.Generator().manual_seed(0))
    moved = pooled_maps(b, images())
    assert (moved-before).abs().max()>1e-5
    if b.spec.family!='timm': # in double precision: the adapted blocks carry rounding that reaches the tolerance
        x = images().double(); b.double()
        with torch.no_grad():
            with capture_attention() as seen: plain = b(x)
            assert torch.equal(plain, b(x))
        oracle = eager_rows_of(b, x); b.float()
        assert max((r.weights-o[:,:,:1]).abs().max().item() for r,o in zip(seen.records, oracle))<=TOLERANCE
    b.model = b.model.merge_and_unload()
    torch.testing.assert_close(pooled_maps(b.eval(), images()), moved, atol=1e-5, rtol=1e-4)

def eager_rows_of(b, x):
    wrapped = b.model
    base = wrapped.get_base_model()
    b.model = base
    try: return eager_rows(b, x)
    finally: b.model = wrapped

# ---- gradients

@pytest.mark.parametrize('name', TINY)
def test_gradients_through_rows(name):
    "A loss on the maps reaches the weights, and its gradient is that of the whole matrix."
    b = load_backbone(name); grads = []
    target = torch.rand(b.spec.grid, b.spec.grid, generator=torch.Generator().manual_seed(1))
    for full in (False, True):
        b.zero_grad()
        with capture_attention(full) as seen: b(images())
        (read_pooled(b, seen.records)[:,-1]*target).sum().backward()
        grads.append(next(p for n,p in b.named_parameters() if 'patch_embed' in n and n.endswith('weight')).grad.clone())
    assert grads[0].abs().max()>0
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-3)

@pytest.mark.parametrize('name', TINY)
def test_full_capture_puts_weights_into_the_graph(name):
    b = load_backbone(name)
    with capture_attention(full=True) as seen: feature = b(images())
    grads = torch.autograd.grad(feature.square().sum(), [r.weights for r in seen.records])
    assert all(g.abs().max()>0 for g in grads)

def test_gradient_of_weights_is_right():
    "By nudging one weight: the output is values weighted by it."
    q,k,v = torch.rand(3,1,2,5,4,dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with capture_attention(full=True) as seen: out = F.scaled_dot_product_attention(q.requires_grad_(), k, v)
    g, = torch.autograd.grad(out[0,1,2,3], seen.records[0].weights)
    expected = torch.zeros_like(g); expected[0,1,2] = v[0,1,:,3]
    assert torch.equal(g, expected)

# ---- options of the two functions

def random_qkv(groups=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(2,4,6,8,generator=g).to(dtype), torch.randn(2,4//groups,7,8,generator=g).to(dtype), torch.randn(2,4//groups,7,8,generator=g).to(dtype)

MASKS = dict(none=None, padding=(torch.arange(7)<5).view(1,1,1,7), boolean=torch.rand(6,7,generator=torch.Generator().manual_seed(3))<.7,
             added=torch.randn(2,1,6,7,generator=torch.Generator().manual_seed(4)), per_head=torch.randn(2,4,1,7,generator=torch.Generator().manual_seed(5)))
MASKS['boolean'][:,0] = True

@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('scale', (None, .3))
@pytest.mark.parametrize('groups', (1, 2))
def test_sdpa_options(mask, scale, groups):
    q,k,v = random_qkv(groups); options = dict(attn_mask=MASKS[mask], scale=scale, enable_gqa=groups>1)
    plain = F.scaled_dot_product_attention(q, k, v, **options)
    with capture_attention() as row: assert torch.equal(F.scaled_dot_product_attention(q, k, v, **options), plain)
    with capture_attention(full=True) as full: out = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(out, plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(full.records[0].weights@v.repeat_interleave(groups, 1), plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(row.records[0].weights, full.records[0].weights[:,:,:1], atol=1e-7, rtol=0)

def test_sdpa_causal_dropout_and_positional_arguments():
    q,k,v = random_qkv()
    with capture_attention() as seen: out = F.scaled_dot_product_attention(q, k, v, None, 0., True)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert (seen.records[0].weights[...,0]==1).all() # the first query sees the first key only
    torch.manual_seed(0); plain = F.scaled_dot_product_attention(q, k, v, dropout_p=.5)
    torch.manual_seed(0)
    with capture_attention() as seen: assert torch.equal(F.scaled_dot_product_attention(query=q, key=k, value=v, dropout_p=.5), plain)
    torch.testing.assert_close(seen.records[0].weights.sum(-1), torch.ones(2,4,1)) # recorded before dropout

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16, torch.float64))
def test_precision(dtype):
    "Weights are computed in float32 at least, whatever the model runs in."
    q,k,v = random_qkv(dtype=dtype)
    with capture_attention() as seen: assert torch.equal(F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    with capture_attention(full=True) as full: assert F.scaled_dot_product_attention(q, k, v).dtype==dtype
    assert seen.records[0].weights.dtype==full.records[0].weights.dtype==torch.promote_types(dtype, torch.float32)

@pytest.mark.parametrize('asks', (dict(), dict(need_weights=False), dict(average_attn_weights=False)))
@pytest.mark.parametrize('batch_first', (True, False))
@pytest.mark.parametrize('full', (True, False))
@pytest.mark.parametrize('kdim', (None, 12))
def test_multihead_attention_gets_what_it_asked_for(asks, batch_first, full, kdim):
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(16, 4, batch_first=batch_first, kdim=kdim, vdim=kdim).eval()
    q = torch.randn(2,3,16); k = torch.randn(2,5,kdim or 16)
    if not batch_first: q,k = q.transpose(0,1),k.transpose(0,1)
    out,weights = mha(q, k, k, **asks)
    with capture_attention(full) as seen: out2,weights2 = mha(q, k, k, **asks)
    if full: torch.testing.assert_close(out2, out, atol=1e-6, rtol=1e-5)
    else: assert torch.equal(out2, out)
    if weights is None: assert weights2 is None
    else: torch.testing.assert_close(weights2, weights, atol=1e-7, rtol=0)
    assert len(seen.records)==1 and seen.records[0].weights.shape==(2,4,3 if full else 1,5)
    oracle = mha(q, k, k, average_attn_weights=False)[1]
    torch.testing.assert_close(seen.records[0].weights, oracle if full else oracle[:,:,:1], atol=1e-7, rtol=0)

def test_multihead_attention_unbatched_masked_and_with_dropout():
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(16, 4, dropout=.5)
    q,k = torch.randn(3,16),torch.randn(5,16)
    for full in (False, True):
        mha.eval()
        with capture_attention(full) as seen: out,_ = mha(q, k, k)
        torch.testing.assert_close(out, mha(q, k, k)[0], atol=1e-6, rtol=1e-5)
        assert seen.records[0].weights.shape==(1,4,3 if full else 1,5)
    pad = torch.tensor([False,False,False,True,True])
    with capture_attention() as seen: mha(q, k, k, key_padding_mask=pad)
    assert (seen.records[0].weights[...,3:]==0).all()
    mha.train()
    torch.manual_seed(1); plain = mha(q, k, k)[0]
    torch.manual_seed(1)
    with capture_attention() as seen: assert torch.equal(mha(q, k, k)[0], plain)
    torch.testing.assert_close(seen.records[0].weights.sum(-1), torch.ones(1,4,1)) # without dropout
    with pytest.raises(NotImplementedError, match='use full=False'):
        with capture_attention(full=True): mha(q, k, k)

# ---- nothing left behind, and clear errors

def test_nothing_stays_after_an_error():
    b = load_backbone('tiny-siglip'); modules = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n,m in b.named_modules()}
    seen = capture_attention()
    with pytest.raises(ZeroDivisionError), seen:
        b(images()); 1/0
    n = len(seen.records); b(images())
    assert len(seen.records)==n==5 and not torch.overrides._get_current_function_mode_stack()
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n,m in b.named_modules()}==modules
    assert torch.backends.mha.get_fastpath_enabled()

def test_contexts_nest():
    b = load_backbone('tiny-clip')
    with capture_attention() as outer:
        b(images())
        with capture_attention() as inner: b(images())
    assert len(outer.records)==8 and len(inner.records)==4

def test_expectations():
    b = load_backbone('tiny-dinov3')
    with torch.no_grad(), capture_attention() as seen: b(images()); b(images())
    with pytest.raises(RuntimeError, match='8 attention calls were seen, 4 were expected'): read_pooled(b, seen.records)
    with pytest.raises(RuntimeError, match='no attention call was seen'): read_pooled(b, [])
    with pytest.raises(RuntimeError, match='5\\+8x8 tokens'): read_pooled(load_backbone('tiny-dinov3', size=64), seen.records[:4])
    for name in HUGGING: # eager attention bypasses the fused call
        slow = load_backbone(name); slow.model.set_attn_implementation('eager')
        with pytest.raises(RuntimeError, match=f"{'1' if slow.spec.pooling=='head' else 'no'} attention call was seen, .*set_attn_implementation\\('sdpa'\\)"): pooled_maps(slow, images())
    with pytest.raises(ValueError, match='backbone.eval'): pooled_maps(b.train(), images())

def test_maps_do_not_depend_on_the_rest_of_the_batch():
    for name in TINY:
        b = load_backbone(name); x = images(n=3)
        torch.testing.assert_close(pooled_maps(b, x)[1:2], pooled_maps(b, x[1:2]), atol=1e-6, rtol=0)

def test_map_follows_the_patch_it_is_about():
    "When one patch of the image changes, the map changes most where that patch lies. With random weights, and in the second block: MAE's untrained class token is zero, and the first block attends evenly."
    for name in ('tiny-dinov2-random', 'tiny-mae-random', 'tiny-clip-random', 'tiny-supervised-random'):
        b = load_backbone(name); row,col = 3,9
        x = torch.full((1,3,96,96), .5); y = x.clone(); y[...,8*row:8*row+8,8*col:8*col+8] = torch.rand(3,8,8,generator=torch.Generator().manual_seed(0))
        change = (pooled_maps(b, y)-pooled_maps(b, x))[0,1].abs().mean(0)
        assert change.argmax().item()==row*12+col, name

def test_received():
    for name in TINY:
        r = received_maps(load_backbone(name), images())
        assert r.shape==(2,4,4,12,12) and (r.sum((-2,-1))<=1+1e-5).all()

# ---- real weights

def test_real_vit_tiny(real):
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor, resize
    b = load_backbone(f"timm/vit_tiny_patch16_224@{real/'vit_tiny_in1k/model.safetensors'}")
    x = torch.stack([resize(pil_to_tensor(Image.open(p).convert('RGB')), (224,224), antialias=True)/255 for p in sorted((real/'large').glob('*.jpg'))[:2]])
    maps = pooled_maps(b, x)
    check(b.double(), x.double()) # its weights reach 1, where float32 rounds by more than the tolerance over twelve blocks
    assert maps.shape==(2,12,3,14,14) and maps[:,-1].flatten(-2).max()*196>5 # trained attention is far from even

# ---- reading what is wanted

@pytest.mark.parametrize('name', TINY)
def test_rows_and_heads_are_those_of_the_whole(name):
    "Any slice that a reader asks for, during the same call, and the same slices of a full capture."
    b = load_backbone(name)
    def read(call):
        whole = call.weights()
        assert (call.n_heads, call.n_keys)==(whole.shape[1], whole.shape[3])==(b.n_heads, b.spec.n_prefix+144) and call.value.shape==(2,4,call.n_keys,24)
        for rows,heads in ((slice(1),slice(2,3)), (slice(5,None),slice(None)), (slice(None),slice(1,3))):
            torch.testing.assert_close(call.weights(rows, heads), whole[:,heads,rows], atol=1e-7, rtol=1e-5)
        return call
    with torch.no_grad():
        with capture_attention(read=read) as seen: watched = b(images())
        assert torch.equal(watched, b(images()))
        with capture_attention(full=True, read=read) as full: b(images())
    assert all(c.matrix is None for c in seen.records) and all(c.weights() is c.matrix for c in full.records)
    assert seen.n_keys==[c.n_keys for c in seen.records] and all(isinstance(c, AttentionCall) for c in seen.records)

def test_heads_and_rows_with_every_option():
    for mask in MASKS:
        for groups in (1, 2):
            q,k,_ = random_qkv(groups); options = dict(attn_mask=MASKS[mask], enable_gqa=groups>1)
            whole = attention_weights(q, k, **options)
            for heads in (slice(1,2), slice(2,4)): # rounding depends on how many heads are multiplied at once
                torch.testing.assert_close(attention_weights(q, k, heads=heads, rows=slice(2,5), **options), whole[:,heads,2:5], atol=1e-6, rtol=1e-5)

def test_nothing_is_computed_that_is_not_asked_for(monkeypatch):
    from ssl_wikichurches.attention import capture as attention
    def refuse(*args, **kwargs): raise AssertionError('weights were computed')
    monkeypatch.setattr(attention, 'attention_weights', refuse); monkeypatch.setattr(attention, '_mha_weights', refuse); monkeypatch.setattr(attention, '_mha_value', refuse)
    b = load_backbone('tiny-siglip')
    with torch.no_grad(), capture_attention(read=lambda call: call.kind) as seen: b(images())
    assert seen.records==['sdpa']*4+['mha']
    with pytest.raises(AssertionError, match='weights were computed'): pooled_maps(b, images())

@pytest.mark.parametrize('name', ('tiny-siglip','tiny-siglip2'))
@torch.no_grad()
def test_output_of_the_pooling_head_from_its_weights(name):
    "Captured weights times values, through the projection, is what nn.MultiheadAttention returned."
    b = load_backbone(name); out = []
    hook = b.model.head.attention.register_forward_hook(lambda m,i,o: out.append(o[0]))
    with capture_attention(read=lambda call: call) as seen: b(images())
    hook.remove(); call = seen.records[-1]
    rebuilt = F.linear((call.weights()@call.value).transpose(1,2).flatten(2), *call.out_proj)
    torch.testing.assert_close(rebuilt, out[0], atol=1e-6, rtol=1e-5)

@torch.no_grad()
def test_output_of_timm_s_pooling_head_from_its_weights():
    b = timm_model('vit_base_patch16_siglip_224'); entered = []
    hook = b.model.attn_pool.proj.register_forward_pre_hook(lambda m,a: entered.append(a[0]))
    with capture_attention(read=lambda call: call) as seen: b(images(64))
    hook.remove(); call = seen.records[-1]
    torch.testing.assert_close((call.weights()@call.value).transpose(1,2).flatten(2), entered[0], atol=1e-6, rtol=1e-5)

@pytest.mark.parametrize('architecture', ('vit_base_patch16_dinov3','vit_base_patch14_reg4_dinov2','vit_base_patch16_siglip_224'))
@torch.no_grad()
def test_every_block_and_row_of_other_timm_models(architecture):
    "Rotations, registers and LayerScale kept in parameters: against timm's own slow attention, all rows of all blocks."
    b = timm_model(architecture)
    with capture_attention(full=True) as seen: b(images(64))
    found = []
    for name,m in b.model.named_modules():
        if hasattr(m, 'fused_attn'): m.fused_attn = False
        if name.endswith('attn_drop'): m.register_forward_pre_hook(lambda _,a: found.append(a[0]))
    b(images(64))
    assert len(found)==3
    for r,o in zip(seen.records, found): torch.testing.assert_close(r.weights, o, atol=1e-6, rtol=0)
    assert max(o.max() for o in found)>.2 # attention is not even

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_weights_of_multihead_attention_are_float32(dtype):
    mha = nn.MultiheadAttention(16, 4, batch_first=True).to(dtype).eval(); x = torch.randn(2,5,16).to(dtype)
    for full in (False, True):
        with torch.no_grad(), capture_attention(full) as seen: out,weights = mha(x, x, x)
        assert seen.records[0].weights.dtype==torch.float32 and out.dtype==weights.dtype==dtype
    def read(call): return call.value
    with torch.no_grad(), capture_attention(read=read) as seen: mha(x, x, x)
    assert seen.records[0].dtype==dtype

def test_values_that_cannot_be_read_are_refused():
    x = torch.randn(1,3,8)
    for options in (dict(add_bias_kv=True), dict(add_zero_attn=True)):
        mha = nn.MultiheadAttention(8, 2, batch_first=True, **options).eval()
        with pytest.raises(NotImplementedError, match='full=False'):
            with capture_attention(full=True): mha(x, x, x)
        with capture_attention() as seen: mha(x, x, x)
        assert seen.n_keys==[4] and seen.records[0].weights.shape==(1,2,1,4)

# ---- received attention, prefix, fusing

@pytest.mark.parametrize('name', TINY)
@torch.no_grad()
def test_received_is_the_mean_of_slow_matrices(name):
    b = load_backbone(name); x = images(); n = b.spec.n_prefix
    slow = timm_rows(b, x) if b.spec.family=='timm' else eager_rows(b, x)
    expected = torch.stack([m[:,:,n:,n:].mean(2) for m in slow], 1).unflatten(-1, (12,12))
    torch.testing.assert_close(received_maps(b, x), expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match='backbone.eval'): received_maps(b.train(), x)

def test_received_does_not_touch_the_fused_call(monkeypatch):
    "The model's own calls are made as they are, and no tensor holds the matrices of all heads."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Largest(TorchDispatchMode):
        numel,fused = 0,0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {})); self.fused += 'scaled_dot_product' in str(func)
            for o in out if isinstance(out, (tuple,list)) else [out]:
                if isinstance(o, torch.Tensor): self.numel = max(self.numel, o.numel())
            return out
    b = load_backbone('tiny-siglip', size=192)
    with Largest() as seen: received_maps(b, images(192, 1))
    assert seen.numel<=576**2 and seen.fused>=4

@pytest.mark.parametrize('name', TINY)
def test_maps_and_prefix_are_one_pass_and_one_row(name):
    b = load_backbone(name); calls = []
    hook = b.model.register_forward_hook(lambda *a: calls.append(1))
    maps,prefix = maps_and_prefix(b, images()); hook.remove()
    assert len(calls)==1 and torch.equal(maps, pooled_maps(b, images()))
    assert prefix.shape==(*maps.shape[:3], b.spec.n_prefix) and (prefix>=0).all()
    torch.testing.assert_close(maps.sum((-2,-1))+prefix.sum(-1), torch.ones(maps.shape[:3]))
    slow = None if b.spec.pooling=='head' else timm_rows(b, images()) if b.spec.family=='timm' else eager_rows(b, images())
    if slow is not None: torch.testing.assert_close(prefix, torch.stack([m[:,:,0,:b.spec.n_prefix] for m in slow], 1), atol=1e-6, rtol=0)

def test_prefix_mass_has_expectations_too():
    with pytest.raises(RuntimeError, match='no attention call was seen'): prefix_mass(load_backbone('tiny-mae'), [])

def test_fusing_heads():
    maps = torch.rand(2,3,4,5,5, generator=torch.Generator().manual_seed(0))
    for how,f in (('mean',lambda x: sum(x)/len(x)), ('max',max), ('min',min)):
        fused = fuse_heads(maps, how); assert fused.shape==(2,3,5,5)
        torch.testing.assert_close(fused[1,2,3,4].item(), f([maps[1,2,h,3,4].item() for h in range(4)]))
    with pytest.raises(ValueError, match='expected \\(..., heads, grid, grid\\)'): fuse_heads(maps[0,0,0])

# ---- artifacts

@pytest.mark.parametrize('name', ('tiny-dinov2','tiny-siglip','tiny-supervised'))
def test_a_long_token_is_an_artifact(name):
    "One patch, made ten times as long behind a block, and only that one is found."
    b = load_backbone(name); n = b.spec.n_prefix
    def lengthen(module, args, out):
        x = (out[0] if isinstance(out, tuple) else out).clone(); x[0,n+40] *= 10
        return (x, *out[1:]) if isinstance(out, tuple) else x
    hook = b.layers[1].register_forward_hook(lengthen)
    found = artifact_patches(b, images(), block=1); hook.remove()
    assert found.dtype==torch.bool and found.shape==(2,12,12)
    assert found[0,3,4] and found[0].sum()==1
    with torch.no_grad(): norms = b.blocks(images())[:,-1].norm(dim=-1)
    for i in range(2):
        z = (norms[i]-norms[i].mean())/norms[i].std(correction=0)
        assert torch.equal(artifact_patches(b, images(), sds=1.5)[i].flatten(), z>1.5)
    assert not artifact_patches(b, images(), sds=12.).any() # none of 144 can be further than the root of 143
    with pytest.raises(ValueError, match='block is 4'): artifact_patches(b, images(), block=4)
    with pytest.raises(ValueError, match='backbone.eval'): artifact_patches(b.train(), images())

def test_masking():
    maps = torch.rand(2,3,4,5,5); odd = torch.zeros(2,5,5, dtype=torch.bool); odd[1,2,3] = True
    masked = mask_patches(maps, odd)
    assert (masked[1,:,:,2,3]==0).all() and torch.equal(masked[0], maps[0]) and (masked==0).sum()==12
    assert mask_patches(maps[:,0,0], odd).shape==(2,5,5) and maps[1,0,0,2,3]>0
    for wrong in (odd.float(), odd[:1], odd[:,:4]):
        with pytest.raises(ValueError, match='one grid per image'): mask_patches(maps, wrong)

# ---- grids

@settings(deadline=None, max_examples=60)
@given(g=st.integers(1, 20), grid=st.integers(1, 20), seed=st.integers(0, 99))
def test_regrid_is_cutting_and_adding(g, grid, seed):
    "Each patch is cut into equal squares that both grids share, which are then added up."
    maps = torch.rand(2,g,g, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    fine = math.lcm(g, grid); cut = fine//g
    squares = maps.repeat_interleave(cut, 1).repeat_interleave(cut, 2)/cut**2
    expected = squares.unflatten(2, (grid,-1)).unflatten(1, (grid,-1)).sum((2,4))
    found = regrid(maps, grid)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(found.sum((1,2)), maps.sum((1,2)))
    assert (found>=0).all()

def test_regrid_to_itself_and_refusals():
    maps = torch.rand(3,2,7,7)
    assert torch.equal(regrid(maps, 7), maps) and regrid(maps.half(), 5).dtype==torch.half
    torch.testing.assert_close(regrid(regrid(maps, 21), 7), maps) # a finer grid that divides loses nothing
    for wrong,grid in ((maps[...,:6], 5), (maps, 0), (maps[0,0,0], 3)):
        with pytest.raises(ValueError, match='expected \\(..., g, g\\)'): regrid(wrong, grid)

# ---- blocks and sizes

@pytest.mark.parametrize('name', TINY)
def test_layers_are_the_blocks_in_order(name):
    b = load_backbone(name); order = []
    hooks = [m.register_forward_hook(lambda m,i,o: order.append(m)) for m in b.layers]
    with torch.no_grad(): b(images())
    for h in hooks: h.remove()
    assert len(order)==b.depth and all(a is m for a,m in zip(order, b.layers))
    n = len(b.state_dict()); b.layers; assert len(b.state_dict())==n
    b.model = peft.get_peft_model(b.model, peft.LoraConfig(target_modules=[m for block in backbones.attention_projections(b) for k,m in block.items() if k!='k'], r=2))
    assert all(a is m for a,m in zip(order, b.layers)) # also when wrapped
    b.depth = 3
    with pytest.raises(ValueError, match='has 3 blocks, but 4 were found'): b.layers

SIZES = [(name, size) for name in ('dinov2','dinov3','mae','clip','siglip','siglip2','supervised') for size in (224,336,448,518 if name=='dinov2' else 512)]

@pytest.mark.parametrize('name,size', SIZES)
@torch.no_grad()
def test_sizes_of_real_patches(name, size):
    "The real classes with the real patch and native size, narrow and shallow: positions are stretched by the family itself, and all rows are those of slow attention."
    spec = replace(BACKBONES[name], size=size)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        if spec.family=='timm': recipe = dict(library='timm', architecture='vit_base_patch16_224', options=dict(embed_dim=32, depth=2, num_heads=2))
        else:
            more = dict(num_register_tokens=4) if spec.n_prefix==5 else {}
            recipe = backbones.transformers_architecture(AutoConfig.for_model(backbones.FAMILIES[spec.family].types[0], hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                                               image_size=518 if name=='dinov2' else 224, patch_size=spec.patch, **more))
        b = backbones.resized(Backbone(BACKBONES[name], backbones.build_architecture(recipe), recipe), spec).eval()
    for p in (p for k,p in b.model.named_parameters() if ('position' in k or k=='pos_embed')): p.normal_(std=.5, generator=torch.Generator().manual_seed(1))
    for block in backbones.attention_projections(b):
        for k in ('q','k','qkv'):
            if k in block: b.model.get_submodule(block[k]).weight[:64].mul_(8)
    x = images(size, 1)
    with capture_attention(full=True) as seen: b(x)
    with capture_attention() as rows: b(x)
    oracle = timm_rows(b, x) if spec.family=='timm' else slow_at(b, x)
    assert seen.records[0].weights.shape[-1]==spec.n_prefix+(size//spec.patch)**2 and len(oracle)==2
    for full,row,o in zip(seen.records, rows.records, oracle):
        torch.testing.assert_close(full.weights, o, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(row.weights, o[:,:,:1], atol=1e-6, rtol=1e-4)
    maps = pooled_maps(b, x); g = size//spec.patch
    assert maps.shape[-2:]==(g,g) and maps.std()>0
    torch.testing.assert_close(regrid(maps, 14).sum((-2,-1)), maps.sum((-2,-1)))

def slow_at(b, x):
    "Slow attention of transformers at an input size that is not the native one."
    b.model.set_attn_implementation('eager')
    try: return b.model(**b._inputs(x), output_attentions=True).attentions
    finally: b.model.set_attn_implementation('sdpa')
