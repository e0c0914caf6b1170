"Maps composed from attention, gradients and values, against oracles that share no code with them."
import copy, gc, itertools
from dataclasses import replace
from functools import partial
import networkx as nx, numpy as np, peft, pytest, timm, torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from ssl_wikichurches.attention import attribution
from ssl_wikichurches.backbones import encoders as backbones
from ssl_wikichurches.attention.capture import artifact_patches, fuse_heads, maps_and_prefix, mask_patches, pooled_maps
from ssl_wikichurches.attention.attribution import (attention_flow, gmar, gmar_weights, grad_cam, gradient_attention, predicted_class, rollout,
                                          token_rollout, value_norm, value_vectors)
from ssl_wikichurches.backbones.encoders import BACKBONES, TINY, load_backbone
from ssl_wikichurches.data.churches import ChurchDataset, eval_transform
from ssl_wikichurches.data.download import load_churches

TIMM = dict(eva='vit_base_patch16_dinov3', registers='vit_base_patch14_reg4_dinov2', latent='vit_base_patch16_siglip_224')
ALL = (*TINY, *TIMM)

def images(size=96, n=2, seed=0): return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))

def encoder(name):
    "A toy with its weights, or a small timm model with random ones, whose LayerScale is of the order of one."
    if name in TINY: return load_backbone(name)
    options = dict(depth=3, embed_dim=96, num_heads=4, img_size=96, patch_size=16)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(1)
        model = backbones.build_timm(TIMM[name], **options)
        for k,p in model.named_parameters():
            if 'gamma' in k: p.uniform_(.5, 1.5)
            elif p.ndim<2: p.add_(torch.randn_like(p)*.1) # biases are not zero
            elif 'attn' in k: p.mul_(4) # attention is not even
    return backbones.load_timm(TIMM[name], lambda m: model.state_dict(), name, options).eval()

def linear(b, classes=4, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return nn.Linear(b.dim, classes)

TARGET = torch.tensor([2,0])

# ---- the oracle: slow attention of the libraries, in the graph

def head_by_hand(head, tokens):
    "SigLIP's pooling head of transformers, from its parameters."
    a,n = head.attention,len(tokens); d = a.head_dim
    def project(x, i): return F.linear(x, a.in_proj_weight.chunk(3)[i], a.in_proj_bias.chunk(3)[i]).unflatten(-1, (a.num_heads, d)).transpose(1,2)
    q,k,v = project(head.probe.expand(n,-1,-1), 0),project(tokens, 1),project(tokens, 2)
    weights = (q@k.transpose(-2,-1)*d**-.5).softmax(-1)
    pooled = F.linear((weights@v).transpose(1,2).flatten(2), a.out_proj.weight, a.out_proj.bias)
    return (pooled+head.mlp(head.layernorm(pooled)))[:,0],weights,pooled[:,0]

def latent_by_hand(pool, tokens):
    "timm's attention pooling, from its parameters."
    n = len(tokens)
    q = pool.q(pool.latent.expand(n,-1,-1)).unflatten(-1, (pool.num_heads, -1)).transpose(1,2)
    k,v = pool.kv(tokens).unflatten(-1, (2, pool.num_heads, -1)).permute(2,0,3,1,4)
    weights = (q@k.transpose(-2,-1)*q.shape[-1]**-.5).softmax(-1)
    pooled = pool.proj((weights@v).transpose(1,2).flatten(2))
    return (pooled+pool.mlp(pool.norm(pooled)))[:,0],weights,pooled[:,0]

def slow(b, x):
    "Feature, and every attention matrix it was computed from (the pooling head's last), without fused attention."
    x = ((x-b.mean)/b.std).requires_grad_(); m = copy.deepcopy(b.model)
    if b.spec.family!='timm':
        m.set_attn_implementation('eager')
        more = dict(noise=torch.arange(float(b.spec.grid**2)).expand(len(x),-1)) if b.spec.family=='mae' else {}
        if b.spec.size!=b.native and b.spec.family in ('mae','clip','siglip'): more['interpolate_pos_encoding'] = True
        out = m(x, output_attentions=True, **more)
        if b.spec.pooling=='head':
            feature,weights,_ = head_by_hand(m.head, out.last_hidden_state)
            return feature,[*out.attentions, weights]
        return out.last_hidden_state[:,0] if b.spec.family=='mae' else out.pooler_output,list(out.attentions)
    found = []
    for name,module in m.named_modules():
        if hasattr(module, 'fused_attn'): module.fused_attn = False
        if name.endswith('attn_drop'): module.register_forward_pre_hook(lambda _,a: found.append(a[0]))
    tokens = m.forward_features(x)
    if b.spec.pooling=='class': return m.forward_head(tokens),found
    feature,weights,_ = latent_by_hand(m.attn_pool, tokens)
    return feature,[*found, weights]

def slow_gradients(b, c, x, target):
    "Matrices and their gradients, one image at a time."
    found = []
    for i in range(len(x)):
        feature,mats = slow(b, x[i:i+1])
        for m in mats: m.retain_grad()
        c(feature)[0,target[i]].backward()
        found.append([(m.detach()[0],m.grad[0]) for m in mats])
    return found

def on_grid(b, row): return row[...,b.spec.n_prefix:].unflatten(-1, (b.spec.grid,)*2)
def mixed(a): a = a+torch.eye(a.shape[-1]); return a/a.sum(-1, keepdim=True)

def close(a, b, atol=1e-6, rtol=1e-4):
    assert a.shape==b.shape and a.dtype==torch.float32
    print(f'largest difference {(a-b).abs().max():.1e} of {b.abs().max():.1e}')
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)

@pytest.mark.parametrize('name', ALL)
def test_the_oracle_computes_the_same_feature(name):
    b = encoder(name)
    with torch.no_grad(): torch.testing.assert_close(slow(b, images())[0], b(images()), atol=1e-4, rtol=1e-4)

# ---- rollout

@pytest.mark.parametrize('how', ('mean','max','min'))
@pytest.mark.parametrize('name', ALL)
def test_rollout_is_the_product_of_slow_matrices(name, how):
    b = encoder(name); fold = dict(mean=torch.mean, max=torch.amax, min=torch.amin)[how]
    with torch.no_grad(): mats = [fold(m, 1) for m in slow(b, images())[1]]
    for start in (0, b.depth-1):
        product = torch.eye(mats[0].shape[-1]).expand(2,-1,-1)
        for a in mats[start:b.depth]: product = mixed(a)@product
        row = (mats[-1]/mats[-1].sum(-1, keepdim=True)@product if b.spec.pooling=='head' else product)[:,0]
        close(rollout(b, images(), how, start), on_grid(b, row))
        torch.testing.assert_close(token_rollout(b, images(), how, start), row, atol=1e-6, rtol=1e-4)

class Chosen(nn.Module):
    "Attends as told; `matrices` (blocks, heads, tokens, tokens)."
    def __init__(self, matrices, n_prefix=1):
        super().__init__()
        self.matrices,self.depth,self.dim,n = matrices,len(matrices),3,matrices.shape[-1]-n_prefix
        self.spec = replace(BACKBONES['tiny-clip'], name='chosen', size=round(n**.5), patch=1, n_prefix=n_prefix)
        self.layers = [nn.Identity() for _ in matrices]
    def forward(self, x):
        x = F.pad(x.flatten(2).transpose(1,2), (0,0,self.spec.n_prefix,0), value=.3)
        for layer,a in zip(self.layers, self.matrices):
            v = layer(x)[:,None].expand(-1,len(a),-1,-1)
            x = x+F.scaled_dot_product_attention(v*0, v*0, v, attn_mask=a.log()).mean(1)
        return x[:,0]

def chosen(blocks, tokens, heads=1, n_prefix=1, seed=0, sharp=1.):
    m = torch.randn(blocks, heads, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    return Chosen((m*sharp).softmax(-1), n_prefix).eval()

def test_rollout_is_a_sum_over_paths():
    "Three tokens, three blocks: nine paths from the class token to each, with and without staying."
    b = chosen(3, 3, heads=2, n_prefix=2, sharp=2.); a = b.matrices.mean(1)
    total = torch.zeros(3)
    for i,j,k in itertools.product(range(3), repeat=3):
        step = lambda l,q,t: (a[l,q,t].item()+(q==t))/2
        total[k] += step(2,0,i)*step(1,i,j)*step(0,j,k)
    torch.testing.assert_close(token_rollout(b, images(1, 1))[0], total)

def test_rollout_by_hand():
    "Everyone looks at the last token: staying has weight 1/2 per block, so the class token keeps 1/4 and gives the rest away."
    m = torch.zeros(2,1,5,5); m[...,4] = 1
    torch.testing.assert_close(token_rollout(Chosen(m).eval(), images(2, 1))[0], torch.tensor([.25,0.,0.,0.,.75]))
    alone = torch.eye(5).expand(3,2,5,5)
    torch.testing.assert_close(token_rollout(Chosen(alone).eval(), images(2, 1))[0], torch.eye(5)[0]) # A = I gives R = I
    one = chosen(1, 5)
    torch.testing.assert_close(token_rollout(one, images(2, 1))[0], (one.matrices[0,0,0]+torch.eye(5)[0])/2) # one block: (A+I)/2

@pytest.mark.parametrize('name', ALL)
def test_maps_are_finite_and_shares_are_shares(name):
    b = encoder(name); c = linear(b)
    for how in ('mean','max','min'):
        row = token_rollout(b, images(), how)
        assert (row>=0).all(); torch.testing.assert_close(row.sum(1), torch.ones(2))
    for norm in ('l1','l2'): assert (gmar(b, c, images(), TARGET, norm).sum((1,2))<=1+1e-5).all()
    for m in methods(b, c).values():
        assert m.shape==(2,b.spec.grid,b.spec.grid) and m.dtype==torch.float32 and not m.requires_grad
        assert torch.isfinite(m).all() and (m>=0).all() and m.max()>0

def methods(b, c, x=None, target=TARGET, flow=False):
    x = images() if x is None else x
    found = dict(rollout=rollout(b, x), max=rollout(b, x, 'max'), gmar=gmar(b, c, x, target), gradient=gradient_attention(b, c, x, target),
                 cam=grad_cam(b, c, x, target), value=value_norm(b, x)[:,-1])
    return found|(dict(flow=attention_flow(b, x)) if flow else {})

# ---- GMAR

@pytest.mark.parametrize('norm', ('l1','l2'))
@pytest.mark.parametrize('name', ALL)
def test_gmar_from_slow_gradients(name, norm):
    b = encoder(name); c = linear(b); rows,weights = [],[]
    for calls in slow_gradients(b, c, images(), TARGET):
        size = torch.stack([g.abs().sum((1,2)) if norm=='l1' else g.square().sum((1,2)).sqrt() for _,g in calls])
        w = size/size.sum(1, keepdim=True); weights.append(w)
        steps = [(w[i][:,None,None]*a).sum(0) for i,(a,_) in enumerate(calls)]
        product = torch.eye(steps[0].shape[-1])
        for a in steps[:b.depth]: product = mixed(a)@product
        rows.append((steps[-1]@product if b.spec.pooling=='head' else product)[0])
    close(gmar_weights(b, c, images(), TARGET, norm), torch.stack(weights), rtol=1e-3)
    close(gmar(b, c, images(), TARGET, norm), on_grid(b, torch.stack(rows)))

@torch.no_grad()
def with_equal_heads(b):
    "Values and output projections alike in all heads, queries and keys not: the gradient of every head's attention is the same."
    d = b.dim//b.n_heads
    for block in backbones.attention_projections(b):
        owner = b.model.get_submodule(block.get('v', block.get('qkv')).rpartition('.')[0])
        v = b.model.get_submodule(block['v']) if 'v' in block else owner.qkv
        rows = slice(-b.dim, None)
        for p in (v.weight, v.bias): p[rows] = p[rows][:d].repeat(b.n_heads, *[1]*(p.ndim-1))
        out = next(getattr(owner, k) for k in ('o_proj','out_proj','proj') if hasattr(owner, k)).weight
        out.copy_(out[:,:d].repeat(1, b.n_heads))
    return b

@pytest.mark.parametrize('name', [k for k in TINY if 'siglip' not in k])
def test_gmar_with_equal_gradients_is_rollout(name):
    b = with_equal_heads(encoder(name)); c = linear(b)
    close(gmar_weights(b, c, images(), TARGET), torch.full((2,4,4), .25), atol=1e-4)
    maps = pooled_maps(b, images()); assert (maps[:,:,0]-maps[:,:,1]).abs().max()>1e-3 # though the heads differ
    close(gmar(b, c, images(), TARGET), rollout(b, images()), atol=1e-6, rtol=1e-3)

@pytest.mark.parametrize('name', ALL)
def test_gmar_weights_follow_the_class_and_not_the_scale_of_its_logit(name):
    b = encoder(name); c = linear(b); w = gmar_weights(b, c, images(), TARGET)
    larger = copy.deepcopy(c)
    with torch.no_grad(): larger.weight.mul_(7.); larger.bias.add_(3.)
    close(gmar_weights(b, larger, images(), TARGET), w, atol=1e-6)
    assert (gmar_weights(b, c, images(), (TARGET+1)%4)-w).abs().max()>1e-3
    assert (gmar_weights(b, c, images(), TARGET, 'l2')-w).abs().max()>1e-4
    torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:2]))

# ---- gradient x attention

@pytest.mark.parametrize('name', ALL)
def test_gradient_attention_is_a_loop_over_images_and_blocks(name):
    b = encoder(name); c = linear(b); loop = slow_gradients(b, c, images(), TARGET)
    for start in (0, b.depth-1):
        rows = []
        for calls in loop:
            bars = [(a*g).clamp(min=0).mean(0) for a,g in calls]; relevance = torch.eye(bars[0].shape[-1])
            for bar in bars[start:b.depth]: relevance = relevance+bar@relevance
            rows.append((bars[-1]@relevance if b.spec.pooling=='head' else relevance)[0])
        expected = on_grid(b, torch.stack(rows))
        close(gradient_attention(b, c, images(), TARGET, start), expected, atol=1e-5*expected.max().item(), rtol=2e-3)

def test_without_a_gradient_relevance_stays_where_it_was():
    for name in ('tiny-dinov3','tiny-siglip','latent'):
        b = encoder(name); c = linear(b)
        nn.init.zeros_(c.weight)
        row = attribution._relevance(b, c, images(), TARGET, 0)
        start = torch.zeros_like(row); start[:,0] = b.spec.pooling=='class'
        assert torch.equal(row, start) and not gradient_attention(b, c, images(), TARGET).any() and not grad_cam(b, c, images(), TARGET).any()
        with pytest.raises(ValueError, match='heads cannot be weighed'): gmar(b, c, images(), TARGET)

def test_gradient_attention_of_one_block_in_closed_form():
    "The feature is the class token plus the mean over heads of the average of values, so a gradient is the logit's weight on a value over the number of heads."
    b = chosen(1, 5, heads=2, sharp=2.); c = linear(b); x = images(2, 1)
    v = F.pad(x.flatten(2).transpose(1,2), (0,0,1,0), value=.3)[0]
    gradient = (v@c.weight[1])/2
    expected = (gradient*b.matrices[0,:,0]).clamp(min=0).mean(0).detach()
    torch.testing.assert_close(gradient_attention(b, c, x, torch.tensor([1]))[0].flatten(), expected[1:])

# ---- Grad-CAM

class Averaging(nn.Module):
    "Tokens pass a block unchanged and are added up with given weights, so all gradients are known."
    def __init__(self):
        super().__init__()
        self.spec = replace(BACKBONES['tiny-clip'], name='averaging', size=4, patch=1, n_prefix=0); self.depth,self.dim,self.layers = 1,3,[nn.Identity()]
        self.share = torch.rand(16, generator=torch.Generator().manual_seed(5))
    def forward(self, x): return (self.share[:,None]*self.layers[0](x.flatten(2).transpose(1,2))).sum(1)

def test_grad_cam_in_closed_form():
    b = Averaging().eval(); c = linear(b); x = images(4)
    alpha = b.share.mean()*c.weight[TARGET]
    expected = torch.einsum('bk,bkhw->bhw', alpha, x).clamp(min=0).detach()
    assert (expected==0).any() and (expected>0).any()
    torch.testing.assert_close(grad_cam(b, c, x, TARGET), expected)

@pytest.mark.parametrize('name', ALL)
def test_grad_cam_from_hidden_states(name):
    "Tokens taken behind the block before, which is how the libraries return them."
    b = encoder(name); c = linear(b); kept = []
    hook = b.layers[-2].register_forward_hook(lambda m,i,o: kept.append(o[0] if isinstance(o, tuple) else o))
    c(b(images().requires_grad_())).gather(1, TARGET[:,None]).sum().backward(inputs=kept); hook.remove()
    n = b.spec.n_prefix; patches,gradient = kept[0][:,n:],kept[0].grad[:,n:]
    expected = (patches*gradient.mean(1, keepdim=True)).sum(-1).relu().detach().unflatten(-1, (b.spec.grid,)*2)
    close(grad_cam(b, c, images(), TARGET), expected, atol=1e-6*expected.max().item())
    assert not torch.equal(grad_cam(b, c, images(), TARGET, block=1), grad_cam(b, c, images(), TARGET))

def test_patches_behind_the_last_block_have_no_gradient_under_class_pooling():
    b = encoder('tiny-mae'); c = linear(b); kept = []
    hook = b.layers[-1].register_forward_hook(lambda m,i,o: kept.append(o[0] if isinstance(o, tuple) else o))
    c(b(images())).gather(1, TARGET[:,None]).sum().backward(inputs=kept); hook.remove()
    assert not kept[0].grad[:,1:].any() and kept[0].grad[:,0].any() # so the tokens that enter it are the ones to take

def test_grad_cam_of_the_library():
    cam = pytest.importorskip('pytorch_grad_cam', reason='the package grad-cam is not installed')
    b = encoder('tiny-supervised'); c = linear(b)
    def to_grid(t): return t[:,1:].unflatten(1, (12,12)).permute(0,3,1,2)
    model = nn.Sequential(b.model, c)
    class Logit:
        def __init__(self, k): self.k = k
        def __call__(self, out): return out[self.k]
    with cam.GradCAM(model=model, target_layers=[b.layers[-2]], reshape_transform=to_grid) as library:
        x = ((images()-b.mean)/b.std)
        library.activations_and_grads(x); targets = [Logit(int(k)) for k in TARGET]
        library(input_tensor=x, targets=targets)
        activations,gradients = library.activations_and_grads.activations[0],library.activations_and_grads.gradients[0]
        raw = np.maximum(library.get_cam_image(x, b.layers[-2], targets, activations.numpy(force=True), gradients.numpy(force=True), False), 0)
    close(grad_cam(b, c, images(), TARGET), torch.tensor(raw), atol=1e-6*raw.max())

# ---- values

def added_by_attention(b, x):
    "What each block's attention adds to the class token, as the difference between what enters the second norm and what entered the block; or what the head's attention returns."
    if b.spec.pooling=='head':
        feature = {}
        if b.spec.family!='timm':
            hook = b.model.head.attention.register_forward_hook(lambda m,i,o: feature.update(out=o[0][:,0]))
            b(x); hook.remove()
            return [feature['out']]
        hook = b.model.attn_pool.proj.register_forward_hook(lambda m,i,o: feature.update(out=o[:,0]))
        b(x); hook.remove()
        return [feature['out']]
    entered,between,hooks = [],[],[]
    for layer in b.layers:
        hooks.append(layer.register_forward_pre_hook(lambda m,a,k: entered.append((a[0] if a else k['hidden_states'])[:,0]), with_kwargs=True))
        norm = next(getattr(layer, k) for k in ('norm2','layer_norm2','layernorm_after') if hasattr(layer, k))
        hooks.append(norm.register_forward_pre_hook(lambda m,a: between.append(a[0][:,0])))
    b(x)
    for h in hooks: h.remove()
    return [y-x for x,y in zip(entered, between)]

@pytest.mark.parametrize('name', ALL)
@torch.no_grad()
def test_values_add_up_to_what_attention_adds(name):
    b = encoder(name); vectors,constants = value_vectors(b, images()); expected = torch.stack(added_by_attention(b, images()), 1)
    assert vectors.shape==(2, len(constants), b.spec.n_prefix+b.spec.grid**2, b.dim) and len(constants)==(1 if b.spec.pooling=='head' else b.depth)
    close(vectors.sum(2)+constants, expected, atol=1e-5*max(1, expected.abs().max().item()))
    norms = value_norm(b, images())
    torch.testing.assert_close(norms.flatten(2), vectors[:,:,b.spec.n_prefix:].norm(dim=-1))
    assert norms.shape==(2, len(constants), b.spec.grid, b.spec.grid)

@pytest.mark.parametrize('name', ('tiny-clip','tiny-dinov2','tiny-supervised','tiny-siglip'))
@torch.no_grad()
def test_values_with_adapters(name):
    "Adapters on values and on the output projection are part of what is moved."
    b = encoder(name); before = value_norm(b, images())
    out = [n for n,m in b.model.named_modules() if isinstance(m, nn.Linear) and n.rpartition('.')[2] in ('o_proj','out_proj','proj') and 'head' not in n]
    targets = [n for block in backbones.attention_projections(b) for k,n in block.items() if k!='k']+out
    b.model = peft.get_peft_model(b.model, peft.LoraConfig(target_modules=targets, r=4)); b.eval()
    torch.testing.assert_close(value_norm(b, images()), before, atol=1e-6, rtol=1e-5)
    for n,p in b.named_parameters():
        if 'lora_B' in n: p.normal_(std=.3, generator=torch.Generator().manual_seed(0))
    adapted = value_norm(b, images())
    assert (adapted-before).abs().max()>1e-4
    vectors,constants = value_vectors(b, images())
    torch.testing.assert_close(vectors.sum(2)+constants, torch.stack(added_by_attention(b, images()), 1), atol=1e-5, rtol=1e-4)
    c = linear(b); maps = methods(b, c)
    b.model = b.model.merge_and_unload(); b.eval()
    for k,m in methods(b, c).items(): torch.testing.assert_close(m, maps[k], atol=1e-4*maps[k].max().item(), rtol=2e-3)

def test_what_follows_attention_must_be_a_projection():
    b = encoder('tiny-supervised')
    b.layers[1].attn.norm = nn.LayerNorm(96).eval()
    with pytest.raises(ValueError, match='no projection'): value_norm(b, images())
    b = encoder('eva'); b.layers[0].another = nn.Parameter(torch.ones(96))
    with pytest.raises(ValueError, match='3 vectors of its own'): value_norm(b, images())

# ---- attention flow

@pytest.mark.parametrize('blocks,tokens,heads', ((1,5,2), (2,5,1), (3,10,2), (4,17,3)))
def test_flow_against_networkx(blocks, tokens, heads):
    b = chosen(blocks, tokens, heads, sharp=3.); steps = [mixed(a.double()) for a in b.matrices.mean(1)][::-1]
    graph = nx.DiGraph()
    for l,a in enumerate(steps):
        for q,k in itertools.product(range(tokens), repeat=2): graph.add_edge((l,q), (l+1,k), capacity=a[q,k].item())
    expected = torch.tensor([nx.maximum_flow_value(graph, (0,0), (blocks,j)) for j in range(1, tokens)])
    found = attention_flow(b, images(b.spec.size, 1))[0].flatten()
    print(f'largest difference {(found-expected).abs().max():.1e}, rounding bound {blocks*tokens**2/2**31:.1e}')
    assert (found-expected).abs().max()<=blocks*tokens**2/2**31+2e-7 # float32 of the weights
    if blocks==1: torch.testing.assert_close(found, rollout(b, images(b.spec.size, 1))[0].flatten())

@pytest.mark.parametrize('name', ('tiny-dinov2','tiny-siglip'))
def test_flow_of_an_encoder_against_networkx(name):
    b = load_backbone(name, size=32); x = images(32, 1)
    with torch.no_grad(): mats = [m.mean(1)[0].double() for m in slow(b, x)[1]]
    steps = [mixed(a) if len(a)==a.shape[1] else a for a in mats][::-1]; graph = nx.DiGraph()
    for l,a in enumerate(steps):
        for q,k in itertools.product(*map(range, a.shape)): graph.add_edge((l,q), (l+1,k), capacity=a[q,k].item())
    found = attention_flow(b, x)[0].flatten(); n = b.spec.n_prefix
    for j in (0, 5, 15): assert abs(found[j].item()-nx.maximum_flow_value(graph, (0,0), (len(steps),n+j)))<2e-6
    assert (found>=rollout(b, x)[0].flatten()-1e-6).all() # what did flow could flow

def test_flow_refuses_what_it_cannot_finish():
    with pytest.raises(ValueError, match='577 tokens are more than limit=300.*smaller `size=`'): attention_flow(load_backbone('tiny-mae', size=192), images(192))
    assert attention_flow(load_backbone('tiny-mae', size=32), images(32), limit=17).shape==(2,4,4)

# ---- properties

@torch.no_grad()
def mirrored(b):
    "The encoder, made blind to left and right: patch kernels and position codes are averaged with their mirror images."
    kernel = next(m for m in b.model.modules() if isinstance(m, nn.Conv2d)).weight
    kernel.copy_((kernel+kernel.flip(-1))/2)
    for name,p in [*b.model.named_parameters(), *b.model.named_buffers()]:
        if 'position_embedding' in name or name=='pos_embed':
            grid = p.view(-1, p.shape[-1])[-b.spec.grid**2:].unflatten(0, (b.spec.grid,)*2)
            grid.copy_((grid+grid.flip(1))/2)
    return b

@pytest.mark.parametrize('name', ('tiny-dinov2','tiny-mae','tiny-clip','tiny-siglip','tiny-supervised','registers','latent'))
def test_mirrored_images_have_mirrored_maps(name):
    b = mirrored(encoder(name)); c = linear(b)
    plain,other = methods(b, c),methods(b, c, images().flip(-1))
    for k in plain:
        assert (plain[k]-plain[k].flip(-1)).abs().max()>1e-3*plain[k].max() # the maps themselves are not symmetric
        torch.testing.assert_close(other[k], plain[k].flip(-1), atol=2e-4*plain[k].max().item(), rtol=1e-3)

@pytest.mark.parametrize('name', ALL)
def test_an_image_does_not_depend_on_its_batch(name):
    b = encoder(name); c = linear(b); x,target = images(n=3),torch.tensor([2,0,3])
    whole,other = methods(b, c, x, target),methods(b, c, x[[2,0,1]], target[[2,0,1]])
    alone = methods(b, c, x[1:2], target[1:2])
    for k,m in whole.items():
        torch.testing.assert_close(other[k], m[[2,0,1]], atol=1e-5*m.max().item(), rtol=1e-3)
        torch.testing.assert_close(alone[k], m[1:2], atol=1e-5*m.max().item(), rtol=1e-3)

HALF = dict(rollout=.02, max=.05, gmar=.02, value=.1, gradient=.1, cam=.25) # root mean square difference over root mean square, for bfloat16

@pytest.mark.parametrize('dtype,share', ((torch.bfloat16, 1.), (torch.float16, .25)))
@pytest.mark.parametrize('name', ('tiny-dinov3','tiny-mae','tiny-siglip','tiny-supervised','latent'))
def test_half_precision(name, dtype, share):
    b = encoder(name); c = linear(b); exact = methods(b, c)
    half = methods(b.to(dtype), c.to(dtype), images().to(dtype))
    for k,m in exact.items():
        gap = ((half[k]-m).square().mean()/m.square().mean()).sqrt().item(); print(k, f'{gap:.4f}')
        assert half[k].dtype==torch.float32 and gap<=HALF[k]*share, (k, gap)

@pytest.mark.parametrize('frozen', (True, False))
@pytest.mark.parametrize('name', ALL)
def test_the_model_stays_as_it_was(name, frozen):
    b = encoder(name).requires_grad_(not frozen); c = linear(b); x = images()
    first = next(b.parameters()); first.grad = torch.full_like(first, 3.)
    def state(): return ([(p.requires_grad, None if p.grad is None else p.grad.clone(), p.detach().clone()) for p in [*b.parameters(), *c.parameters()]],
                         [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in b.modules()])
    before = state()
    with torch.inference_mode(): methods(b, c)
    with torch.no_grad(): methods(b, c, x)
    predicted_class(b, c, x)
    after = state()
    assert after[1]==before[1] and not x.requires_grad
    for (r,g,p),(r2,g2,p2) in zip(before[0], after[0]):
        assert r==r2 and torch.equal(p, p2) and (g is None)==(g2 is None) and (g is None or torch.equal(g, g2))
    assert not torch.overrides._get_current_function_mode_stack()

def test_hooks_are_removed_after_errors():
    b = encoder('tiny-clip'); c = linear(b); n = lambda: sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for m in b.modules())
    before = n()
    for call in (partial(grad_cam, b, c), partial(gmar, b, c), partial(gradient_attention, b, c)):
        with pytest.raises(ValueError, match='takes float images'): call(images(64), TARGET)
    with pytest.raises(ValueError, match='takes float images'): value_norm(b, images(64))
    assert n()==before

def test_refusals():
    b = encoder('tiny-clip'); c = linear(b); x = images()
    with pytest.raises(ValueError, match='block is 4: tiny-clip has 4 blocks, 0 to 3'): rollout(b, x, start=4)
    with pytest.raises(ValueError, match='block is -5'): grad_cam(b, c, x, TARGET, block=-5)
    with pytest.raises(ValueError, match="norm is 'l3'"): gmar(b, c, x, TARGET, 'l3')
    with pytest.raises(ValueError, match='classifier takes 8 features, tiny-clip gives 96'): gmar(b, nn.Linear(8,4), x, TARGET)
    for wrong in (TARGET[:1], TARGET.float(), TARGET+2, TARGET-1):
        for f in (gmar, gradient_attention, grad_cam):
            with pytest.raises(ValueError, match='one class in \\[0, 4\\) per image'): f(b, c, x, wrong)
    with pytest.raises(ValueError, match='backbone.eval'): methods(b.train(), c)
    b.eval().model.set_attn_implementation('eager')
    for f in (partial(rollout, b), partial(value_norm, b), partial(attention_flow, b), lambda x: gmar(b, c, x, TARGET)):
        with pytest.raises(RuntimeError, match="set_attn_implementation\\('sdpa'\\)"): f(x)

# ---- memory

class Largest(TorchDispatchMode):
    numel = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple,list)) else [out]:
            if isinstance(t, torch.Tensor): self.numel = max(self.numel, t.numel())
        return out

@pytest.mark.parametrize('name', TINY)
def test_rollout_never_holds_the_matrices_of_all_heads(name):
    b = load_backbone(name, size=192); n = b.spec.n_prefix+576; x = images(192, 2)
    for f in (partial(rollout, b), partial(rollout, b, how='max')):
        with Largest() as seen: f(x)
        assert seen.numel==2*n*n # one matrix per image; four heads would be four
    with Largest() as seen: gmar(b, linear(b), x, TARGET)
    assert seen.numel>=4*2*n*n # and the mode would have seen them

def peak(call):
    "Bytes that were allocated at the same time, at most."
    call(); gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: call()
    live = np.cumsum([e[1] for e in sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name()=='[memory]')])
    return live.max()

def test_memory_is_what_the_notebook_says():
    b = load_backbone('tiny-mae', size=224); c = linear(b); x = images(224, 1); matrix = 4*785**2; target = TARGET[:1]
    plain,graph = peak(lambda: torch.no_grad()(b)(x)),peak(lambda: b(x.clone().requires_grad_()))
    rolled,gradient = peak(lambda: rollout(b, x)),peak(lambda: gmar(b, c, x, target))
    print(f'in matrices: forward {plain/matrix:.2f}, graph {graph/matrix:.2f}, rollout {rolled/matrix:.2f}, gmar {gradient/matrix:.2f}')
    assert 3*matrix<rolled<=4.1*matrix+plain
    assert 4*4*matrix<gradient<=(4+2)*4*matrix+graph

# ---- real weights and photographs

def test_real_vit_tiny_on_photographs(real):
    path = real/'vit_tiny_in1k/model.safetensors'; state = load_file(path)
    b = load_backbone(f'timm/vit_tiny_patch16_224@{path}').requires_grad_(False)
    c = nn.Linear(192, 1000)
    with torch.no_grad(): c.weight.copy_(state['head.weight']); c.bias.copy_(state['head.bias'])
    churches = load_churches(real/'photos')
    x = torch.stack([i['image'] for i in ChurchDataset(churches, churches.boxes.image.unique()[:2], eval_transform(224))])
    target = predicted_class(b, c, x); assert torch.equal(target, timm_logits(path, x).argmax(1))
    feature,mats = slow(b, x)
    product = torch.eye(197).expand(2,-1,-1)
    for a in mats: product = mixed(a.mean(1).detach())@product
    close(rollout(b, x), on_grid(b, product[:,0]), atol=1e-6, rtol=1e-3)
    rows = []
    for calls in slow_gradients(b, c, x, target):
        relevance = torch.eye(197)
        for a,g in calls: relevance = relevance+(a*g).clamp(min=0).mean(0)@relevance
        rows.append(relevance[0])
    expected = on_grid(b, torch.stack(rows))
    close(gradient_attention(b, c, x, target), expected, atol=1e-3*expected.max().item(), rtol=1e-2)
    with torch.no_grad(): vectors,constants = value_vectors(b, x); added = torch.stack(added_by_attention(b, x), 1)
    torch.testing.assert_close(vectors.sum(2)+constants, added, atol=1e-5*added.abs().max().item(), rtol=1e-3)
    maps,prefix = maps_and_prefix(b, x)
    torch.testing.assert_close(maps.sum((-2,-1))+prefix[...,0], torch.ones(2,12,3))
    for m in methods(b, c, x, target).values(): assert torch.isfinite(m).all() and (m>=0).all() and m.shape==(2,14,14)

def test_real_vit_tiny_keeps_its_notes_in_the_corners(real):
    "Long tokens take most of the largest attention and have little to say, so the value norm passes them over (Darcet et al., 2024; Kobayashi et al., 2020)."
    b = load_backbone(f"timm/vit_tiny_patch16_224@{real/'vit_tiny_in1k/model.safetensors'}")
    churches = load_churches(real/'photos')
    x = torch.stack([i['image'] for i in ChurchDataset(churches, churches.boxes.image.unique()[:12], eval_transform(224))])
    odd,row,value = artifact_patches(b, x),fuse_heads(pooled_maps(b, x)[:,-1]),value_norm(b, x)[:,-1]
    corners = torch.zeros_like(odd); corners[:,[0,0,-1,-1],[0,-1,0,-1]] = True
    assert odd[corners].float().mean()>.8 and not odd[:,1:-1,1:-1].any()
    top = row.flatten(1).topk(20, dim=1); share = (top.values*odd.flatten(1).gather(1, top.indices)).sum()/top.values.sum()
    per_attention = (value[odd].sum()/row[odd].sum())/(value[~odd].sum()/row[~odd].sum())
    print(f'{odd.sum((1,2)).float().mean():.1f} artifacts per photograph, {share:.2f} of the top attention, {per_attention:.2f} of the value per attention of other patches')
    assert share>.5 and per_attention<.2
    assert row.flatten(1).argmax(1).eq(mask_patches(row, odd).flatten(1).argmax(1)).float().mean()<.5 # where the map points changes

@torch.no_grad()
def timm_logits(path, x):
    model = timm.create_model('vit_tiny_patch16_224', checkpoint_path=str(path)).eval()
    return model((x-.5)/.5)
