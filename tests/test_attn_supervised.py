"Attention supervision: what the loss is, what it reaches, what it must not change, and that no church is supervised and measured."
from dataclasses import asdict, replace
import json, math
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from timm_models import timm_model
from small import SIDE, load_backbone
from ssl_wikichurches.finetune import attn_supervised
from ssl_wikichurches.finetune import training as finetune
from ssl_wikichurches.attention.capture import capture_attention, pooled_maps
from ssl_wikichurches.finetune.attn_supervised import (BOXES, LOSSES, AttentionTerm, AttnSupervisedRecipe, EndlessOrder, attention_loss, box_donors, annotated_batches, check_crossfit, crossfit_folds,
                                              crossfit_parts, fit_attn_supervised, prior_mask, pull_loss, same_owner, stay_loss, supervised_maps, union_masks, weight_at)
from ssl_wikichurches.backbones.encoders import attention_projections
from ssl_wikichurches.data.churches import ChurchDataset, eval_transform
from ssl_wikichurches.data.download import load_churches
from ssl_wikichurches.finetune.training import TrainData, make_recipe
from ssl_wikichurches.finetune.full import FullRecipe, fit_full, restore_full
from ssl_wikichurches.data.splits import make_split

def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
def numbers(history): return history.drop(columns='images_per_second')

TIMM = ('vit_base_patch16_dinov3','vit_base_patch16_siglip_224')
MODELS = ('tiny-dinov2','tiny-dinov3','tiny-mae','tiny-clip','tiny-siglip','tiny-supervised',*TIMM)
def model(name): return timm_model(name) if name in TIMM else load_backbone(name)

def boxes_loss(maps, boxes, size, *args, **kwargs): return attention_loss(maps, union_masks(boxes, size), *args, **kwargs)

def batch(size, n=3, seed=0):
    "Images, and boxes; the second image has none."
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, 2, generator=g)*size*.5
    boxes = [torch.cat([c, c+size*(.2+.3*torch.rand(2, 2, generator=g))], 1) for c in corner]
    boxes[1] = torch.zeros(0, 4)
    return torch.rand(n, 3, size, size, generator=g),boxes

# ---- the losses, from pixels and by hand

def by_hand(a, mask, kind, eps=1e-3):
    "One map (g, g) and one mask (s, s), in loops over patches."
    g,s = len(a),len(mask)
    p,edge = a.double()/a.double().sum(),s//g
    cover = [[mask[i*edge:(i+1)*edge,j*edge:(j+1)*edge].double().mean().item() for j in range(g)] for i in range(g)]
    total = sum(map(sum, cover))
    pairs = [(p[i,j].item(), cover[i][j]/total, cover[i][j]) for i in range(g) for j in range(g)]
    mixed = lambda v: (1-eps)*v+eps/g**2
    if kind=='cosine': return 1-sum(v*t for v,t,_ in pairs)/math.sqrt(sum(v*v for v,_,_ in pairs)*sum(t*t for _,t,_ in pairs))
    if kind=='kl': return sum(t*math.log(t/mixed(v)) for v,t,_ in pairs if t)
    return -math.log(sum(c*mixed(v) for v,_,c in pairs))

@pytest.mark.parametrize('kind', LOSSES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), g=st.sampled_from((2,3,6)))
def test_losses_by_hand(kind, seed, g):
    gen = torch.Generator().manual_seed(seed)
    maps,masks = torch.rand(2, 3, g, g, generator=gen),torch.rand(2, 12, 12, generator=gen)<.3
    masks[:,0,0] = True
    want = [[by_hand(m, k, kind) for m in ms] for ms,k in zip(maps, masks)]
    torch.testing.assert_close(pull_loss(maps, masks, kind), torch.tensor(want, dtype=torch.double), atol=1e-9, rtol=1e-9)

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_scale_is_free(seed, scale):
    gen = torch.Generator().manual_seed(seed)
    maps,masks = torch.rand(2, 3, 6, 6, generator=gen, dtype=torch.double),torch.rand(2, 12, 12, generator=gen)<.3
    masks[:,0,0] = True
    for k in LOSSES: torch.testing.assert_close(pull_loss(scale*maps, masks, k), pull_loss(maps, masks, k), atol=1e-12, rtol=1e-10)

def test_perfect_and_disjoint_maps():
    mask = torch.zeros(1, 12, 12, dtype=torch.bool); mask[:,:4,:6] = True
    on,off = mask.double(),(~mask).double()
    assert pull_loss(on, mask, 'cosine').abs()<1e-12 and (pull_loss(off, mask, 'cosine')-1).abs()<1e-12
    for k in ('kl','inside'): assert pull_loss(on, mask, k)<2e-3 and 5<pull_loss(off, mask, k)<20
    whole = torch.ones(1, 12, 12, dtype=torch.bool)
    assert pull_loss(torch.rand(1, 4, 4), whole, 'inside').abs()<1e-9 # nowhere else to look

@pytest.mark.parametrize('kind', LOSSES)
@pytest.mark.parametrize('per_head', (False,True))
def test_gradient_by_finite_differences(kind, per_head):
    gen = torch.Generator().manual_seed(1)
    maps = (.1+torch.rand(3, 2, 2, 3, 3, generator=gen, dtype=torch.double)).requires_grad_()
    frozen,(_,boxes) = torch.rand(maps.shape, generator=gen, dtype=torch.double)+.1,batch(12)
    assert torch.autograd.gradcheck(lambda m: boxes_loss(m, boxes, 12, kind, per_head, frozen, .5), maps, atol=1e-7)

def test_heads_are_averaged_and_not_images():
    gen = torch.Generator().manual_seed(2)
    maps,(_,boxes) = torch.rand(3, 1, 4, 6, 6, generator=gen),batch(12)
    masks = union_masks(boxes, 12)
    want = np.mean([by_hand(maps[i,0].double().mean(0), masks[i], 'cosine') for i in (0,2)])
    assert boxes_loss(maps, boxes, 12, 'cosine').item()==pytest.approx(want, abs=1e-7)
    want = np.mean([by_hand(h, masks[i], 'cosine') for i in (0,2) for h in maps[i,0]])
    assert boxes_loss(maps, boxes, 12, 'cosine', per_head=True).item()==pytest.approx(want, abs=1e-7)
    shuffled = maps[:,:,torch.randperm(4, generator=gen)]
    assert boxes_loss(shuffled, boxes, 12).item()==pytest.approx(boxes_loss(maps, boxes, 12).item(), abs=1e-7)
    order = [2,0,1]
    assert boxes_loss(maps[order], [boxes[i] for i in order], 12).item()==pytest.approx(boxes_loss(maps, boxes, 12).item(), abs=1e-12)

@pytest.mark.parametrize('kind', LOSSES)
@pytest.mark.parametrize('fill', (0., math.nan, math.inf))
def test_images_without_boxes_are_inert(kind, fill):
    maps,(_,boxes) = torch.rand(3, 1, 4, 6, 6),batch(12)
    frozen = torch.rand(maps.shape)
    maps[1] = frozen[1] = fill
    maps.requires_grad_()
    loss = boxes_loss(maps, boxes, 12, kind, frozen=frozen, stay=1.)
    loss.backward()
    pair = [0,2]
    assert loss.item()==boxes_loss(maps[pair], [boxes[i] for i in pair], 12, kind, frozen=frozen[pair], stay=1.).item()
    assert (maps.grad[1]==0).all() and maps.grad[pair].isfinite().all() and maps.grad[pair].abs().amax()>0
    maps.grad = None
    tiny = torch.tensor([[3.1,3.1,3.2,3.2]]) # no pixel's center lies in it
    none = boxes_loss(maps, [boxes[1], boxes[1], tiny], 12, kind)
    none.backward()
    assert none.item()==0 and (maps.grad==0).all()

def test_stay_holds_only_what_is_outside():
    gen = torch.Generator().manual_seed(3)
    frozen,mask = torch.rand(1, 1, 4, 4, generator=gen, dtype=torch.double),torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:,:,:4] = True # whole patches
    pulled = frozen.clone(); pulled[...,:2] *= torch.rand(4, 2, generator=gen, dtype=torch.double)*20
    assert stay_loss(pulled, frozen, mask, 0.).abs()<1e-12
    other = torch.rand(1, 1, 4, 4, generator=gen, dtype=torch.double)
    p,q = (m[0,0,:,2:].flatten() for m in (frozen, other))
    want = F.kl_div((q/q.sum()).log(), p/p.sum(), reduction='sum')
    torch.testing.assert_close(stay_loss(other, frozen, mask, 0.)[0,0], want)
    other.requires_grad_()
    stay_loss(other, frozen, mask|True).sum().backward()
    assert (other.grad==0).all() # everything is boxed: nothing to hold, and no nan

# ---- what the loss reaches

@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_supervised_maps_are_those_that_are_measured(name):
    b = model(name)
    x,_ = batch(b.spec.size)
    measured = pooled_maps(b, x)
    for blocks in ([-1],) if 'siglip' in name else ([-1],[0],[-2,-1],[1,-1,0]): assert torch.equal(supervised_maps(b, x, blocks), measured[:,blocks])

def of_block(b, i):
    "Names of a block's parameters, and those that make its queries and keys."
    inner,model = next(n for n,m in b.named_modules() if m is b.layers[i]),b.model
    names = attention_projections(b)[i]
    return inner+'.',{k:f'model.{n}.weight' for k,n in names.items()}

def zero(p): return p is None or bool((p==0).all())

@pytest.mark.parametrize('kind', LOSSES)
@pytest.mark.parametrize('name,block', [(n,b) for n in MODELS if 'siglip' not in n for b in (-1,-2)])
def test_gradients_reach_queries_and_keys_of_the_block_only(name, block, kind):
    b = model(name).train()
    x,boxes = batch(b.spec.size)
    boxes_loss(supervised_maps(b, x, [block]), boxes, b.spec.size, kind).backward()
    grads = {n:p.grad for n,p in b.named_parameters()}
    prefix,p = of_block(b, block)
    if 'qkv' in p:
        q,k,v = grads[p['qkv']].chunk(3)
        assert (v==0).all()
    else:
        q,k = grads[p['q']],grads[p['k']]
        assert grads[p['v']] is None
        bias = grads.get(p['k'].replace('weight', 'bias'))
        assert bias is None or bias.norm()<1e-5*q.norm() # the same for all keys: softmax does not see it
    assert q.abs().max()>1e-7 and k.abs().max()>1e-7
    after = [n for n in grads if n.startswith(prefix) and any(w in n for w in ('o_proj','out_proj','attn.proj','mlp','fc1','fc2','up_proj','down_proj','norm2','layer_norm2','layernorm_after','layer_scale','ls1','ls2','gamma','lambda'))]
    assert len(after)>=4 and all(grads[n] is None for n in after), after
    later = [of_block(b, i)[0] for i in range(b.depth+block+1, b.depth)]
    assert all(grads[n] is None for n in grads if n.startswith(tuple(later))) if later else True
    first = of_block(b, 0)[0]
    assert any(not zero(g) for n,g in grads.items() if n.startswith(first)) # all of the blocks before

@pytest.mark.parametrize('name', [n for n in MODELS if 'siglip' in n])
def test_gradients_of_a_pooling_head(name):
    b = model(name).train()
    x,boxes = batch(b.spec.size)
    maps = supervised_maps(b, x, [-1])
    assert maps.shape[1]==1
    boxes_loss(maps, boxes, b.spec.size).backward()
    grads = {n:p.grad for n,p in b.named_parameters()}
    head = {n:g for n,g in grads.items() if n.startswith(('model.head','model.attn_pool'))}
    reached = {n for n,g in head.items() if not zero(g)}
    if name in TIMM: # q and k,v apart: the upper half of kv is the keys
        kv = head['model.attn_pool.kv.weight']
        assert (kv[len(kv)//2:]==0).all() and kv[:len(kv)//2].abs().max()>1e-7 and head['model.attn_pool.q.weight'].abs().max()>1e-7
        assert head['model.attn_pool.latent'].abs().max()>0
    else:
        q,k,v = head['model.head.attention.in_proj_weight'].chunk(3)
        assert (v==0).all() and q.abs().max()>1e-7 and k.abs().max()>1e-7 and head['model.head.probe'].abs().max()>0
    assert not [n for n in reached if 'mlp' in n or 'out_proj' in n or n.endswith(('attn_pool.proj.weight','attn_pool.proj.bias'))]
    assert any(not zero(g) for n,g in grads.items() if n.startswith(of_block(b, 0)[0]))

@pytest.mark.parametrize('name', ('tiny-dinov2','tiny-siglip',TIMM[0]))
def test_gradients_of_weights_by_finite_differences(name):
    "In double precision, along a random direction of the supervised queries' weights, and of all weights."
    b = model(name).double()
    x,boxes = batch(b.spec.size); x = x.double()
    def loss():
        with capture_attention() as seen: b(x)
        records = seen.records[-1:] # of the last block, or the head
        maps = torch.stack([r.weights[:,:,0] for r in records], 1)[...,b.spec.n_prefix:].unflatten(-1, (b.spec.grid,)*2)
        assert maps.dtype==torch.double
        return boxes_loss(maps, boxes, b.spec.size, 'inside')
    params = [p for p in b.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss(), params, allow_unused=True)
    gen,h = torch.Generator().manual_seed(4),1e-5
    for only in (None, max(range(len(params)), key=lambda i: 0 if grads[i] is None else grads[i].norm().item())):
        step = [torch.randn(p.shape, generator=gen, dtype=p.dtype)*(only in (None,i)) for i,p in enumerate(params)]
        want = sum((g*d).sum() for g,d in zip(grads, step) if g is not None).item()
        with torch.no_grad():
            ends = []
            for sign in (1,-2):
                for p,d in zip(params, step): p.add_(d, alpha=sign*h)
                ends.append(loss().item())
            for p,d in zip(params, step): p.add_(d, alpha=h)
        assert (ends[0]-ends[1])/(2*h)==pytest.approx(want, rel=1e-5)

# ---- boxes and pixels

def test_boxes_of_a_batch_are_where_the_pixels_are(data, monkeypatch):
    "White boxes on black photographs: the mask after crop and flip is what is white."
    names = list(data.split.eval)
    def painted(path, side):
        from torchvision import tv_tensors
        image = torch.zeros(3, 192, 192)
        for r in data.churches.boxes[data.churches.boxes.image==path.name].itertuples():
            x0,y0,x1,y1 = (round(192*v) for v in (r.left, r.top, r.left+r.width, r.top+r.height))
            image[:,y0:y1,x0:x1] = 1
        return tv_tensors.Image(image)
    monkeypatch.setattr('ssl_wikichurches.data.churches._load', painted)
    monkeypatch.setattr('torchvision.transforms.v2.ColorJitter.transform', lambda self, x, params: x)
    images,boxes = next(iter(annotated_batches(data, names, 12, seed=1)))
    masks = union_masks(boxes, SIDE)
    white = images.mean(1)>.5
    iou = (masks&white).flatten(1).sum(1)/(masks|white).flatten(1).sum(1)
    wrong = (masks.flip(-1)&white).flatten(1).sum(1)/(masks.flip(-1)|white).flatten(1).sum(1)
    assert iou.min()>.75 and iou.mean()>.88 and wrong.mean()<.6

@pytest.mark.parametrize('kind', LOSSES)
def test_mirrored_maps_and_boxes_have_the_same_loss(kind):
    maps,(_,boxes) = torch.rand(3, 2, 4, 6, 6),batch(48)
    mirrored = [torch.stack([48-b[:,2], b[:,1], 48-b[:,0], b[:,3]], 1) for b in boxes]
    assert boxes_loss(maps.flip(-1), mirrored, 48, kind).item()==pytest.approx(boxes_loss(maps, boxes, 48, kind).item(), abs=1e-9)

def test_batches_are_a_function_of_seed_and_step(data):
    names = list(data.split.eval)
    first = [b for b,_ in zip(annotated_batches(data, names, 5, seed=2), range(4))]
    here = torch.get_rng_state()
    later = [b for b,_ in zip(annotated_batches(data, names, 5, seed=2, start=2), range(2))]
    assert torch.equal(torch.get_rng_state(), here)
    for (a,b),(c,d) in zip(first[2:], later): assert torch.equal(a, c) and all(torch.equal(x, y) for x,y in zip(b, d))
    other = next(iter(annotated_batches(data, names, 5, seed=3)))[0]
    assert not torch.equal(first[0][0], other)
    with pytest.raises(ValueError, match='no boxes'): annotated_batches(data, [data.split.train[0]], 1)

@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), size=st.integers(1, 12), seed=st.integers(0, 99), start=st.integers(0, 9))
def test_every_round_has_every_position_once(n, size, seed, start):
    flat = [p for b,_ in zip(EndlessOrder(n, size, seed), range(30)) for p in b]
    for r in range(len(flat)//n): assert sorted(i for i,_ in flat[r*n:(r+1)*n])==list(range(n))
    assert [b for b,_ in zip(EndlessOrder(n, size, seed, start), range(3))]==[flat[i*size:(i+1)*size] for i in range(start, start+3)]
    assert len(set(s for _,s in flat))==len(flat)

# ---- folds

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(2, 5))
def test_folds_divide_churches(seed, k):
    rng = np.random.default_rng(seed)
    style_of = rng.integers(0, 4, 30)
    owner = np.r_[np.arange(30), rng.integers(0, 30, 15)]
    images = [f'i{j:02d}' for j in rng.permutation(45)]
    folds = crossfit_folds(images, [f'Q{o}' for o in owner], style_of[owner], k, seed)
    assert sorted(folds.index)==sorted(images) and set(folds)==set(range(k))
    table = pd.DataFrame(dict(fold=folds.loc[images].to_numpy(), church=owner, style=style_of[owner]))
    assert (table.groupby('church').fold.nunique()==1).all()
    assert table.fold.value_counts().max()<=2*45/k
    for f in range(k): check_crossfit(folds.index[folds!=f], folds.index[folds==f], pd.Series([f'Q{o}' for o in owner], images))

def test_a_run_uses_all_folds_but_its_own(data):
    names = list(data.split.eval)
    folds = crossfit_folds(names, data.churches.images.church.loc[names], data.labels.loc[names], 3)
    for f in range(3):
        supervised,held = crossfit_parts(data, AttnSupervisedRecipe(folds=3, fold=f))
        assert sorted(held)==sorted(folds.index[folds==f]) and sorted(supervised)==sorted(folds.index[folds!=f]) and len(supervised)>len(held)

def test_folds_refuse():
    with pytest.raises(ValueError, match='twice'): crossfit_folds(['a','a','b'], ['Q1','Q1','Q2'], [0,0,1], 2)
    for k in (1,4): # one style: k folds of three churches
        with pytest.raises(ValueError, match='folds'): crossfit_folds(['a','b','c'], ['Q1','Q2','Q3'], [0,0,0], k)

def test_a_planted_leak_is_caught(data, monkeypatch):
    recipe = AttnSupervisedRecipe(folds=2)
    names = list(data.split.eval)
    real = crossfit_folds
    owner = data.churches.images.church.copy()
    a,b = names[0],next(n for n in names if real(names, owner.loc[names], data.labels.loc[names], 2)[n]!=real(names, owner.loc[names], data.labels.loc[names], 2)[names[0]])
    leaky = replace(data, churches=replace(data.churches, images=data.churches.images.assign(church=owner.where(owner.index!=a, owner[b]))))
    crossfit_parts(leaky, recipe) # divided by church: no leak
    monkeypatch.setattr(attn_supervised, 'crossfit_folds', lambda images, churches, *a: real(images, images, *a)) # by photograph
    caught = 0
    for seed in range(8):
        folds = real(names, names, data.labels.loc[names], 2, seed)
        if folds[a]==folds[b]: continue
        caught += 1
        with pytest.raises(ValueError, match=f'{owner[b]} is supervised and measured'): fit_attn_supervised(load_backbone('tiny-clip'), leaky, replace(recipe, fold_seed=seed))
    assert caught

def test_copies_of_a_picture_stay_in_one_fold(data, monkeypatch):
    names = list(data.split.eval)
    recipe = AttnSupervisedRecipe(folds=2)
    fold_of = lambda: {n:n in crossfit_parts(data, recipe)[1] for n in names}
    apart = fold_of()
    pairs = [(a,b) for a in names[:12] for b in names[12:24] if apart[a]!=apart[b]][:3]
    copies = pd.DataFrame(pairs, columns=['image','copy_of']).assign(bits=0)
    monkeypatch.setattr(attn_supervised, 'near_duplicates', lambda churches, images, of: copies)
    together = fold_of()
    assert all(together[a]==together[b] for a,b in pairs)

@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_owners_are_the_components_of_copies(pairs):
    churches = pd.Series([f'Q{i}' for i in range(10)], [f'i{i}' for i in range(10)])
    got = same_owner(churches, pd.DataFrame([(f'i{a}',f'i{b}') for a,b in pairs], columns=['image','copy_of']))
    group = list(range(10))
    for _ in range(10): # union by hand
        for a,b in pairs: group = [min(group[a], group[b]) if g in (group[a],group[b]) else g for g in group]
    assert [[got.iloc[i]==got.iloc[j] for j in range(10)] for i in range(10)]==[[group[i]==group[j] for j in range(10)] for i in range(10)]

# ---- boxes that say less

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_donors_are_other_churches(seed):
    rng = np.random.default_rng(seed)
    names,churches,styles = [f'i{j}' for j in rng.permutation(24)],[f'Q{j//2}' for j in range(24)],[j//12 for j in range(24)]
    church,style = dict(zip(names, churches)),dict(zip(names, styles))
    for boxes in ('same_style','shuffled'):
        d = box_donors(names, churches, styles, boxes, seed)
        assert d.keys()=={*names} and sorted(d.values())==sorted(names) and all(church[a]!=church[b] for a,b in d.items())
        assert boxes=='shuffled' or all(style[a]==style[b] for a,b in d.items())
        order = rng.permutation(24)
        assert box_donors([names[k] for k in order], [churches[k] for k in order], [styles[k] for k in order], boxes, seed)==d
    with pytest.raises(ValueError, match='expected'): box_donors(names, churches, styles, 'own')
    with pytest.raises(ValueError, match='half'): box_donors(['a','b','c'], ['Q1','Q2','Q3'], [0,0,1], 'same_style')

def test_donated_boxes_arrive(data):
    names = list(data.split.eval)[:8]
    donors = dict(zip(names, names[1:]+names[:1]))
    loader = annotated_batches(data, names, 8, augment=False, donors=donors)
    order = [names[i] for i,_ in next(iter(loader.batch_sampler))]
    images,boxes = next(iter(loader))
    own = {i['name']:i for i in ChurchDataset(data.churches, names, eval_transform(data.size))}
    for n,x,b in zip(order, images, boxes): assert torch.equal(x, own[n]['image']) and torch.equal(b, own[donors[n]]['boxes'].as_subclass(torch.Tensor))

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_prior_mask_by_hand(seed):
    masks = torch.rand(5, 6, 6, generator=torch.Generator().manual_seed(seed))<.3
    counts = masks.sum(0).flatten().tolist()
    n = round(sum(counts)/5)
    want = sorted(range(36), key=lambda k: (-counts[k],k))[:n]
    assert prior_mask(masks).flatten().nonzero().flatten().tolist()==sorted(want)
    assert torch.equal(prior_mask(masks[:1]), masks[0])

def test_the_prior_is_one_target_for_all(data):
    b,names = load_backbone('tiny-clip'),list(data.split.eval)[:10]
    term = AttentionTerm(b, data, names, AttnSupervisedRecipe(folds=2, boxes='prior'))
    seen = []
    term.loss = lambda images, masks: seen.append(masks) or next(b.parameters()).sum()*0
    term(None, None, None, 0) # the batch of the classes has no part in it
    want = prior_mask(union_masks([i['boxes'] for i in ChurchDataset(data.churches, names, eval_transform(data.size))], data.size))
    assert len(seen[0])==8 and all(torch.equal(m, want) for m in seen[0])

# ---- training

SHORT = dict(epochs=2, batch=30, lr=1e-3, backbone_lr=1e-4)

@pytest.mark.parametrize('name', ('tiny-clip','tiny-siglip'))
def test_weight_0_is_full_fine_tuning_bit_for_bit(two_dozen, name):
    data = two_dozen
    full = fit_full(load_backbone(name), data, FullRecipe(**SHORT), 3)
    recipe = AttnSupervisedRecipe(**SHORT, weight=0., folds=2)
    none = fit_attn_supervised(load_backbone(name), data, recipe, 3)
    assert none.held_out==crossfit_parts(data, recipe)[1] and not full.held_out
    assert same(full.state, none.state) and same(full.other, none.other)
    pd.testing.assert_frame_equal(numbers(full.history), numbers(none.history), check_exact=True)

def test_a_weight_that_vanishes_approaches_it_through_the_other_path(two_dozen, monkeypatch):
    "The loss is computed at every step, its gradient is exactly 0: the same weights, so nothing else was touched."
    data = two_dozen
    full = fit_full(load_backbone('tiny-clip'), data, FullRecipe(**SHORT, drop_path=0.), 3)
    monkeypatch.setattr(attn_supervised, 'weight_at', lambda *a: 0.)
    beside = fit_attn_supervised(load_backbone('tiny-clip'), data, AttnSupervisedRecipe(**SHORT, folds=2), 3)
    assert same(full.state, beside.state) and (beside.history.extra_loss>0).all()

@pytest.mark.parametrize('name,more', [('tiny-clip',{}), ('tiny-siglip',dict(kind='kl',stay=.5)), ('tiny-dinov3',dict(kind='cosine',per_head=True,blocks='-2,-1')), ('tiny-clip',dict(precision='bfloat16'))])
def test_training_pulls_and_can_be_restored(two_dozen, name, more):
    data = two_dozen
    recipe = AttnSupervisedRecipe(epochs=3, batch=20, lr=1e-3, backbone_lr=5e-4, weight=2., ratio=.4, folds=2, **more)
    start = load_backbone(name)
    names = crossfit_parts(data, recipe)[0]
    items = ChurchDataset(data.churches, names, eval_transform(SIDE))
    x,boxes = torch.stack([i['image'] for i in items]),[i['boxes'] for i in items]
    blocks = [int(t) for t in recipe.blocks.split(',')]
    before = boxes_loss(pooled_maps(start, x)[:,blocks], boxes, SIDE, recipe.kind, recipe.per_head).item()
    f = fit_attn_supervised(load_backbone(name), data, recipe, 1)
    after = boxes_loss(pooled_maps(f.backbone, x)[:,blocks], boxes, SIDE, recipe.kind, recipe.per_head).item()
    assert after<before
    again = restore_full(load_backbone(name), recipe, f.state)
    assert torch.equal(again(x), f.backbone(x))

def test_a_killed_training_ends_with_the_same_bits(two_dozen, tmp_path, monkeypatch):
    "With a weight that rises over the steps, which go on where they were."
    data = two_dozen
    recipe = AttnSupervisedRecipe(epochs=2, batch=18, lr=1e-3, folds=2, weight_warmup=.8, ratio=.2)
    fit = lambda folder: fit_attn_supervised(load_backbone('tiny-clip'), data, recipe, 5, 'cpu', folder)
    whole = fit(None)
    class Killed(Exception): pass
    real,steps = finetune._gradients,iter(range(100))
    def step(*args):
        if next(steps)==3: raise Killed
        return real(*args)
    with monkeypatch.context() as m:
        m.setattr(finetune, '_gradients', step)
        with pytest.raises(Killed): fit(tmp_path)
    again = fit(tmp_path)
    assert same(again.state, whole.state)
    pd.testing.assert_frame_equal(numbers(again.history), numbers(whole.history), check_exact=True)
    with pytest.raises(ValueError, match='another training'): fit_attn_supervised(load_backbone('tiny-clip'), data, replace(recipe, fold=1), 5, 'cpu', tmp_path)
    fewer = replace(data, split=replace(data.split, eval=data.split.eval[1:])) # the same recipe, other supervised photographs
    with pytest.raises(ValueError, match='another training'): fit_attn_supervised(load_backbone('tiny-clip'), fewer, recipe, 5, 'cpu', tmp_path)

@pytest.mark.parametrize('control', BOXES)
def test_held_out_boxes_are_never_read(two_dozen, control):
    "Other boxes on the held-out fold give the same weights to the last bit."
    data = replace(two_dozen, split=replace(two_dozen.split, eval=make_split(two_dozen.churches).eval)) # enough churches of each style to exchange boxes
    recipe = AttnSupervisedRecipe(epochs=1, batch=30, lr=1e-3, folds=2, boxes=control)
    held = crossfit_parts(data, recipe)[1]
    boxes = data.churches.boxes.copy()
    boxes.loc[boxes.image.isin(held), ['left','top','width','height']] = [.0,.0,.1,.1]
    other = replace(data, churches=replace(data.churches, boxes=boxes))
    a,b = (fit_attn_supervised(load_backbone('tiny-clip'), d, recipe, 2).state for d in (data, other))
    assert same(a, b)
    boxes.loc[~boxes.image.isin(held), ['left','top','width','height']] = [.0,.0,.1,.1]
    assert not same(a, fit_attn_supervised(load_backbone('tiny-clip'), other, recipe, 2).state)

def test_a_step_whose_crops_lost_every_box_adds_nothing(data, monkeypatch):
    b,recipe = load_backbone('tiny-clip'),AttnSupervisedRecipe(folds=2, batch=8)
    term = AttentionTerm(b, data, data.split.eval[:9], recipe)
    monkeypatch.setattr(attn_supervised, 'annotated_batches', lambda *a: [(torch.rand(2, 3, SIDE, SIDE), [torch.zeros(0, 4)]*2)])
    assert math.isnan(term(None, None, None, 0)['extra_loss']) and all(p.grad is None for p in b.parameters())

def test_weight_rises_and_recipe_round_trips():
    r = AttnSupervisedRecipe(weight=3., weight_warmup=.5)
    assert [weight_at(i, 4, r) for i in range(4)]==[1.5,3,3,3] and weight_at(0, 4, replace(r, weight_warmup=0.))==3
    assert AttnSupervisedRecipe(**json.loads(json.dumps(asdict(r))))==r and make_recipe(AttnSupervisedRecipe, weight=3, weight_warmup=.5)==r
    for bad in (dict(kind='dice'), dict(boxes='none'), dict(weight=-1.), dict(ratio=0.), dict(stay=-.1), dict(folds=1), dict(fold=5), dict(blocks='last'), dict(blocks='-1,-1'), dict(weight_warmup=2.)):
        with pytest.raises(ValueError, match='|'.join(bad)): AttnSupervisedRecipe(**bad)

def test_several_processes_are_refused(data, monkeypatch):
    class Two(finetune.Team):
        def __init__(self): super().__init__(); self.n = 2
        def share(self, loader, every=True): return loader
    monkeypatch.setattr(finetune, 'Team', Two)
    with pytest.raises(ValueError, match='one process'): fit_attn_supervised(load_backbone('tiny-clip'), data, AttnSupervisedRecipe(folds=2))

def test_real_photographs_are_pulled_in_fold(real):
    "A real ViT-Tiny and some steps: its maps move into the boxes that it is given, and folds leave out whole buildings."
    churches = load_churches(str(real/'photos'))
    split = make_split(churches)
    backbone = load_backbone(f"timm/vit_tiny_patch16_224@{real/'vit_tiny_in1k/model.safetensors'}", size=96)
    data = TrainData(churches, replace(split, train=split.train[::30], val=split.val[:8]), 96)
    recipe = AttnSupervisedRecipe(epochs=4, batch=8, ratio=1., lr=1e-3, backbone_lr=1e-4, folds=3, augment=False)
    supervised,held = crossfit_parts(data, recipe)
    owner = churches.images.church
    assert len(held)>=15 and not {*owner.loc[list(supervised)]}&{*owner.loc[list(held)]}
    items = ChurchDataset(churches, supervised, eval_transform(96))
    x,boxes = torch.stack([i['image'] for i in items]),[i['boxes'] for i in items]
    before = boxes_loss(pooled_maps(backbone, x)[:,-1:], boxes, 96).item()
    fitted = fit_attn_supervised(backbone, data, recipe)
    after = boxes_loss(pooled_maps(fitted.backbone, x)[:,-1:], boxes, 96).item()
    assert fitted.held_out==held and after<.8*before and fitted.history.extra_loss.iloc[-1]<fitted.history.extra_loss.iloc[0]
