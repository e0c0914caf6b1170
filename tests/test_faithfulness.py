"Occlusion, curves and the box test against closed forms, slow loops and planted effects."
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from scipy import stats
from torch import nn
from ssl_wikichurches.attention.capture import pooled_maps
from ssl_wikichurches.backbones.encoders import load_backbone
from ssl_wikichurches.data.churches import STYLES, box_mask
from ssl_wikichurches.data.download import load_churches
from ssl_wikichurches.stats.faithfulness import (Matched, area_shifts, before_and_after, blank_images, box_maps, box_summary, box_test, curve_areas, matched_boxes,
                                           matched_sets, occlude, occlusion_maps, patch_ranks, perturbation_curves, pixel_rectangles)
from ssl_wikichurches.finetune.training import StyleModel, TrainData, new_classifier
from ssl_wikichurches.finetune.linear import logistic_probe, pooled_features
from ssl_wikichurches.stats.shift import paired_shift
from ssl_wikichurches.data.splits import make_split

BLACK,GRAY = (0.,0.,0.),(.5,.4,.3)
NAMES = tuple(STYLES.values())

def seeded(seed): return torch.Generator().manual_seed(seed)
def pictures(n, size=32, seed=0): return torch.rand(n, 3, size, size, generator=seeded(seed))
def names_of(n): return [f'Q{i+1}_wd0.jpg' for i in range(n)]

class Linear(nn.Module):
    "Logits are weighted sums of pixels: what occlusion takes away is known."
    def __init__(self, weight):
        super().__init__(); self.register_buffer('weight', weight) # (classes, s, s)
        self.sizes = []
    def forward(self, x): self.sizes.append(len(x)); return torch.einsum('nchw,khw->nk', x.double(), self.weight.double())

def linear(size=32, classes=3, seed=1, scale=.05): return Linear(scale*torch.randn(classes, size, size, generator=seeded(seed))).eval()

# ---- occlusion

def test_occlusion_replaces_the_mask_and_nothing_else():
    x = pictures(3); masks = torch.rand(3,32,32,generator=seeded(2))<.3
    for how in (dict(color=GRAY), dict(fill='blur')):
        y = occlude(x, masks, **how); blank = blank_images(x, **how)
        for n in range(3):
            assert torch.equal(y[n][:,~masks[n]], x[n][:,~masks[n]]) and torch.equal(y[n][:,masks[n]], blank[n][:,masks[n]])
    for c,v in enumerate(GRAY): assert (occlude(x, masks, color=GRAY)[:,c][masks]==torch.tensor(v)).all()

@pytest.mark.parametrize('name', ('tiny-clip','tiny-siglip','tiny-dinov2'))
def test_gray_is_zero_after_normalization(name):
    b = load_backbone(name)
    assert (blank_images(pictures(1, 96), color=b.spec.mean).sub(b.mean).div(b.std)==0).all()

@pytest.mark.parametrize('size', (12, 96, 224))
def test_blur_is_the_gaussian_of_scipy(size):
    from scipy.ndimage import gaussian_filter
    x = pictures(1, size)[0]
    wanted = np.stack([gaussian_filter(c, size/12, mode='mirror', radius=round(size/4)) for c in x.double().numpy()])
    assert np.abs(blank_images(x[None], 'blur')[0].numpy()-wanted).max()<1e-5

# ---- curves

def loop_curves(model, images, maps, labels, steps, color):
    "One image and one step at a time, pixels replaced by slices."
    rows = []
    for x,m,y in zip(images, maps, labels):
        g,s = len(m),images.shape[-1]; c = s//g
        order = sorted(range(g*g), key=lambda k: (-m[k//g,k%g].item(), k))
        for curve in ('deletion','insertion'):
            for i in range(steps+1):
                shown = x.clone() if curve=='deletion' else torch.tensor(color).view(3,1,1).expand_as(x).clone()
                for k in order[:i*g*g//steps]:
                    a,b = k//g*c,k%g*c
                    shown[:,a:a+c,b:b+c] = torch.tensor(color).view(3,1,1) if curve=='deletion' else x[:,a:a+c,b:b+c]
                rows.append(model(shown[None]).double().softmax(1)[0,y].item())
    return np.array(rows)

@pytest.mark.parametrize('steps', (1, 5, 16, 64))
def test_curves_equal_a_slow_loop(steps):
    model,x,y = linear(),pictures(4),torch.tensor([0,2,1,1]); maps = torch.randint(0, 9, (4,8,8), generator=seeded(3)).float() # many ties
    c = perturbation_curves(model, x, maps, y, names_of(4), names_of(4), steps, color=GRAY)
    gap = np.abs(c.probability.to_numpy()-loop_curves(model, x, maps, y, steps, GRAY)).max()
    print(f'{steps} steps: largest difference {gap:.1e}')
    assert gap<1e-12 and len(c)==4*2*(steps+1)
    assert c.groupby(['image','curve']).share.agg(lambda s: [*s]).map(lambda s: s==[i*64//steps/64 for i in range(steps+1)]).all()

def test_curves_of_a_backbone_equal_a_slow_loop(data, images):
    b = load_backbone('tiny-clip'); model = StyleModel(b, new_classifier(b.dim)).eval(); model.classifier.weight.data.mul_(100)
    y = torch.tensor([0,1,2,3]); maps = pooled_maps(b, images)[:,-1].mean(1)
    c = perturbation_curves(model, images, maps, y, names_of(4), names_of(4), 4, color=b.spec.mean)
    with torch.no_grad():
        gap = np.abs(c.probability.to_numpy()-loop_curves(model, images, maps, y, 4, b.spec.mean)).max()
        exact = model(images).double().softmax(1).gather(1, y[:,None])[:,0].numpy() # as the user computes it
    print(f'backbone: largest difference {gap:.1e}')
    assert gap<1e-5
    ends = c.set_index(['image','curve','step']).probability
    for n,p in zip(names_of(4), exact):
        assert ends[n,'deletion',0]==p==ends[n,'insertion',4] and ends[n,'deletion',4]==ends[n,'insertion',0]

def test_areas_in_closed_form():
    "A class whose log-odds fall by the same amount at every step: the area is a sum of logistic values."
    model = Linear(torch.stack([torch.full((8,8), .01), torch.zeros(8,8)])).eval()
    x = torch.ones(1,3,8,8); c = perturbation_curves(model, x, torch.rand(1,8,8), torch.tensor([0]), names_of(1), names_of(1), 8, color=BLACK)
    p = 1/(1+np.exp(-1.92*(1-np.arange(9)/8)))
    a = curve_areas(c).set_index('curve').area
    assert abs(a['deletion']-(p[0]/2+p[1:-1].sum()+p[-1]/2)/8)<1e-7 and abs(a['deletion']-a['insertion'])<1e-12
    flat = c.assign(probability=.3); assert np.allclose(curve_areas(flat).area, .3)
    other = pd.concat([c.assign(order='a'), flat.assign(order='b')]) # further columns tell curves apart, order of rows does not matter
    again = curve_areas(other.sample(frac=1, random_state=0)).set_index(['order','curve']).area
    assert np.isclose(again['a','deletion'], a['deletion']) and np.isclose(again['b','insertion'], .3)

def test_best_and_worst_order_of_a_linear_model():
    "Patches in the order of what they give: no order has a smaller deletion area, its reverse a larger one."
    model,x = linear(scale=.02),pictures(1); y = torch.tensor([1])
    model.weight[[0,2]] = 0
    gives = torch.nn.functional.avg_pool2d((x.sum(1)*model.weight[1])[:,None], 4)[:,0]
    area = lambda m: curve_areas(perturbation_curves(model, x, m, y, names_of(1), names_of(1), 64, color=BLACK)).set_index('curve').area
    best,worst = area(gives),area(-gives)
    for seed in range(20):
        some = area(torch.rand(1,8,8,generator=seeded(seed)))
        assert best['deletion']<=some['deletion']<=worst['deletion'] and best['insertion']>=some['insertion']>=worst['insertion']

def test_only_the_order_of_a_map_counts_and_ties_go_to_the_earlier_patch():
    m = torch.rand(5,6,6,generator=seeded(0))
    assert torch.equal(patch_ranks(m), patch_ranks(m.mul(7).exp())) and torch.equal(patch_ranks(m).sort(1).values, torch.arange(36).expand(5,36))
    assert torch.equal(patch_ranks(torch.full((2,6,6), -3.)), torch.arange(36).expand(2,36))
    tied = torch.randint(0, 3, (5,6,6), generator=seeded(1)).float(); wanted = torch.tensor(np.stack([stats.rankdata(-t.flatten(), 'ordinal')-1 for t in tied]))
    assert torch.equal(patch_ranks(tied), wanted)

class FlipInvariant(nn.Module):
    def __init__(self): super().__init__(); self.inner = linear(seed=5)
    def forward(self, x): return self.inner(x)+self.inner(x.flip(-1))

@pytest.mark.parametrize('how', (dict(color=GRAY), dict(fill='blur')))
def test_flipping_everything_changes_nothing(how):
    model,x,y = FlipInvariant().eval(),pictures(3),torch.tensor([0,1,2]); maps = torch.rand(3,8,8,generator=seeded(1))
    a,b = (perturbation_curves(model, *t, y, names_of(3), names_of(3), 8, **how) for t in ((x,maps), (x.flip(-1),maps.flip(-1))))
    assert np.abs(a.probability-b.probability).max()<1e-6
    assert torch.allclose(occlusion_maps(model, x, y, 8, **how).flip(-1), occlusion_maps(model, x.flip(-1), y, 8, **how), atol=1e-6)
    m = matched_sets([torch.tensor([[2.,3.,9.,12.]])]*3, names_of(3), 32, n=5)
    turn = lambda r: torch.stack([32-r[...,2],r[...,1],32-r[...,0],r[...,3]], -1)
    mirrored = [replace(k, experts=turn(k.experts), sets=turn(k.sets)) for k in m]
    a,b = (box_test(model, *t, y, names_of(3), names_of(3), **how) for t in ((x,m), (x.flip(-1),mirrored)))
    assert np.abs(a[['drop','matched']]-b[['drop','matched']]).to_numpy().max()<1e-6 and (a.beaten==b.beaten).all()

def test_batches_bound_memory_and_change_nothing():
    x,y = pictures(3),torch.tensor([0,1,2]); maps = torch.rand(3,8,8,generator=seeded(1)); m = matched_sets([torch.tensor([[2.,3.,9.,12.]])]*3, names_of(3), 32, n=7)
    asks = dict(curves=lambda model,b: perturbation_curves(model, x, maps, y, names_of(3), names_of(3), 8, color=GRAY, batch=b).probability.to_numpy(),
                boxes=lambda model,b: box_test(model, x, m, y, names_of(3), names_of(3), color=GRAY, batch=b)[['drop','matched','beaten']].to_numpy(),
                occlusion=lambda model,b: occlusion_maps(model, x, y, 4, color=GRAY, batch=b).numpy())
    for name,ask in asks.items():
        found = []
        for batch in (1, 5, 1000):
            model = linear(); found.append(ask(model, batch))
            assert max(model.sizes)<=batch
        assert np.abs(found[0]-found[2]).max()<1e-10 and np.abs(found[1]-found[2]).max()<1e-10, name

def test_occlusion_maps_in_closed_form():
    model,x,y = linear(),pictures(2),torch.tensor([2,0])
    lost = occlusion_maps(model, x, y, 4, color=GRAY)
    for n in range(2):
        for k in range(16):
            mask = torch.zeros(32,32,dtype=torch.bool); mask[k//4*8:k//4*8+8,k%4*8:k%4*8+8] = True
            gone = ((x[n]-torch.tensor(GRAY).view(3,1,1)).double().sum(0)*model.weight*mask).sum((1,2))
            whole = model(x[n:n+1])[0]
            assert abs(lost[n,k//4,k%4]-(whole.log_softmax(0)-(whole-gone).log_softmax(0))[y[n]])<1e-5

def test_box_maps_are_shares():
    b = [torch.tensor([[3.,1.,17.,22.], [10.,10.,30.,12.]]), torch.tensor([[0.,0.,32.,32.]])]
    m = box_maps(b, 32, 8)
    for n in range(2):
        mask = box_mask(b[n], 32).numpy()
        assert all(m[n,r,c]==mask[4*r:4*r+4,4*c:4*c+4].mean() for r in range(8) for c in range(8))

def test_area_shifts_are_paired_by_church():
    rng = np.random.default_rng(0)
    names = [f'Q{k//2}_wd{k%2}.jpg' for k in range(20)] # two photographs of each church
    areas = pd.concat([pd.DataFrame(dict(order=o, image=names, church=[n.split('_')[0] for n in names], curve='deletion', area=rng.uniform(0,1,20))) for o in ('attention','random')])
    row = area_shifts(areas).loc[('deletion','attention')]
    a,r = (areas[areas.order==o].area.to_numpy().reshape(10,2).mean(1) for o in ('attention','random'))
    wanted = paired_shift(r, a)
    assert row.n==10 and np.allclose(row[['difference','low','high','p']].astype(float), [wanted[k] for k in ('shift','low','high','p')])
    with pytest.raises(ValueError, match='no curve is of order'): area_shifts(areas, 'chance')

# ---- matched boxes

boxes_of_an_image = st.lists(st.tuples(st.floats(0,44), st.floats(0,44), st.floats(1.5,16), st.floats(1.5,16)), min_size=1, max_size=5).map(
    lambda b: torch.tensor([[x,y,min(48,x+w),min(48,y+h)] for x,y,w,h in b]))

def check(m, size, tolerance=.05):
    "What every set of matched boxes must fulfil, pixel by pixel."
    union = np.zeros((size,size), bool)
    for l,t,r,b in m.experts.tolist(): union[t:b,l:r] = True
    assert (len(m.sets)>0) or m.note
    for s in m.sets:
        placed = np.zeros_like(union)
        for (l,t,r,b),e in zip(s.tolist(), m.experts.tolist()):
            assert 0<=l<r<=size and 0<=t<b<=size and (r-l,b-t)==(e[2]-e[0],e[3]-e[1])
            placed[t:b,l:r] = True
        assert not (placed&union).any() and abs(placed.sum()/union.sum()-1)<=tolerance

@settings(max_examples=60, deadline=None, derandomize=True)
@given(boxes_of_an_image, st.integers(0,2**31), st.sampled_from((0., .05, .3)))
def test_matched_boxes_are_matched(boxes, seed, tolerance):
    if not len(pixel_rectangles(boxes, 48)): return
    m = matched_boxes(boxes, 48, seeded(seed), n=4, tolerance=tolerance, tries=20)
    check(m, 48, tolerance)
    assert torch.equal(m.sets, matched_boxes(boxes, 48, seeded(seed), n=4, tolerance=tolerance, tries=20).sets)
    assert torch.equal(box_mask(m.experts, 48), box_mask(boxes, 48)) and (len(m.sets)==4)==(not m.note)

@settings(max_examples=40, deadline=None, derandomize=True)
@given(boxes_of_an_image, st.integers(-20,20), st.integers(-20,20))
def test_moving_the_experts_boxes_keeps_sets_valid(boxes, dx, dy):
    low,high = boxes[:,:2].amin(0),boxes[:,2:].amax(0)
    move = torch.tensor([dx,dy]).maximum(-low.floor()).minimum((48-high).floor())
    moved = boxes+move.repeat(2)
    if not len(pixel_rectangles(boxes, 48)): return
    a,b = (matched_boxes(x, 48, seeded(0), n=3, tries=20) for x in (boxes, moved))
    check(a, 48); check(b, 48)
    size = lambda m: (m.experts[:,2:]-m.experts[:,:2]).tolist()
    assert size(a)==size(b)

@settings(max_examples=100, deadline=None, derandomize=True)
@given(boxes_of_an_image)
def test_rectangles_are_the_pixels_of_the_mask(boxes):
    assert torch.equal(box_mask(pixel_rectangles(boxes, 48), 48), box_mask(boxes, 48))

def test_boxes_that_overlap_move_together():
    "A portal in a porch stays in it, so the union keeps its area exactly."
    porch = torch.tensor([[4.,4.,20.,16.], [8.,8.,12.,16.], [30.,30.,33.,35.]])
    m = matched_boxes(porch, 64, seeded(0), n=20)
    assert len(m.sets)==20
    for s in m.sets:
        assert torch.equal(s[1]-s[0], m.experts[1]-m.experts[0])
        assert box_mask(s, 64).sum()==box_mask(porch, 64).sum()
    assert len({tuple(s[0].tolist()) for s in m.sets})>10 and len({tuple((s[2]-s[0]).tolist()) for s in m.sets})>10

def test_every_place_is_equally_likely():
    "One box of 2 x 1 in a frame of 4 x 4, the experts' in a corner: ten places, chi-square."
    m = matched_boxes(torch.tensor([[0.,0.,2.,1.]]), 4, seeded(0), n=3000)
    places,counts = np.unique(m.sets[:,0,:2].numpy(), axis=0, return_counts=True)
    assert len(places)==4*3-2 and stats.chisquare(counts).pvalue>.001

def test_images_without_room_say_so():
    whole = matched_boxes(torch.tensor([[0.,0.,30.,20.]]), 32, seeded(0))
    assert len(whole.sets)==0 and whole.note=='no room for 30 x 20 pixels'
    both = torch.tensor([[0.,0.,32.,11.], [0.,21.,32.,32.]]) # each would fit between, but for one row
    assert matched_boxes(both, 32, seeded(0)).note=='no room for 32 x 11, 32 x 11 pixels'
    crowd = torch.tensor([[0.,0.,32.,8.], [0.,10.,32.,18.]]) # room for one of the two
    assert matched_boxes(crowd, 32, seeded(0), tries=5).note=='no set in 5 tries'
    joined = torch.tensor([[0.,0.,32.,3.], [0.,0.,3.,32.]]) # the other's bar is always in the way
    assert matched_boxes(joined, 32, seeded(0)).note=='no room for 32 x 3, 3 x 32 pixels'
    rows = box_test(linear(), pictures(1), [whole], torch.tensor([0]), names_of(1), names_of(1), color=GRAY)
    assert (rows.n==0).all() and rows.matched.isna().all() and rows['drop'].notna().all() and (rows.note==whole.note).all()

def test_groups_without_room_are_taken_apart():
    "Two boxes that share a pixel have no room together, and have it one by one."
    boxes = torch.tensor([[0.,12.,17.,20.], [16.,4.,32.,13.]])
    m = matched_boxes(boxes, 32, seeded(0), n=10)
    assert len(m.sets)==10; check(m, 32)
    apart = m.sets[:,1]-m.sets[:,0]
    assert not (apart==m.experts[1]-m.experts[0]).all(1).any() and len(apart.unique(dim=0))>3

def test_sets_depend_on_name_and_seed_only():
    b = [torch.tensor([[1.,2.,9.,8.]]), torch.tensor([[20.,2.,26.,8.]])]
    a = matched_sets(b, names_of(2), 32, n=5)
    assert torch.equal(a[1].sets, matched_sets(b[1:], names_of(2)[1:], 32, n=5)[0].sets)
    assert not torch.equal(a[1].sets, matched_sets(b[1:], names_of(2)[1:], 32, n=5, seed=1)[0].sets)

# ---- the box test

def test_drops_in_closed_form():
    model,x,y = linear(),pictures(3),torch.tensor([0,1,2]); names = names_of(3)
    m = matched_sets([torch.tensor([[2.,3.,9.,12.], [8.,8.,14.,15.]])]*3, names, 32, n=6)
    found = box_test(model, x, m, y, names, names, color=GRAY).set_index(['output','image'])
    for i,n in enumerate(names):
        whole = model(x[i:i+1])[0]
        left = [whole-((x[i]-torch.tensor(GRAY).view(3,1,1)).double().sum(0)*model.weight*box_mask(r, 32)).sum((1,2)) for r in (m[i].experts,*m[i].sets)]
        for output,f in dict(logit=lambda v: v, log_probability=lambda v: v.log_softmax(0)).items():
            d,*c = ((f(whole)-f(v))[y[i]].item() for v in left)
            row = found.loc[output,n]
            assert np.allclose(row[['drop','matched','difference']].astype(float), [d,np.mean(c),d-np.mean(c)], atol=1e-5)
            assert np.isclose(row.beaten, np.mean(np.array(c)<d)) and np.isclose(row.p, (1+np.sum(np.array(c)>=d))/7)
        assert np.isclose(found.loc['logit',n].probability, whole.softmax(0)[y[i]]) and found.loc['logit',n].correct==(whole.argmax()==y[i])
        assert np.isclose(found.loc['logit',n].area, box_mask(m[i].experts, 32).float().mean())

def simulated(n, seed, places=True):
    "Noise pictures with one or two boxes at random."
    g = seeded(seed); b = []
    for _ in range(n):
        xy = torch.randint(0, 22, (1,2), generator=g).float(); wh = torch.randint(3, 10, (1,2), generator=g).float()
        b.append(torch.cat([xy,xy+wh], 1))
    return pictures(n, seed=seed),b,names_of(n)

def test_a_planted_effect_is_found_and_its_absence_too():
    x,b,names = simulated(30, 0); y = torch.zeros(30, dtype=torch.long); m = matched_sets(b, names, 32, n=20)
    masks = torch.stack([box_mask(k, 32) for k in b])
    class Inside(nn.Module):
        "Reads the boxes' pixels of each picture, or all others' but theirs and the matched boxes'. Pictures are told apart by their last pixel."
        def __init__(self, masks): super().__init__(); self.masks = masks
        def forward(self, shown):
            which = (shown[:,None,:,-1,-1]-x[None,:,:,-1,-1]).abs().sum(-1).argmin(1)
            return torch.stack([(shown.sum(1)*self.masks[which]).double().sum((1,2)), torch.zeros(len(shown), dtype=torch.double)], 1)
    masks[:,-1,-1] = False
    for k in m: k.sets[:] = torch.where((k.sets[...,2:]==32).all(-1, keepdim=True), k.sets-torch.tensor([1,1,1,1]), k.sets) # the last pixel stays
    read = box_summary(box_test(Inside(masks).eval(), x, m, y, names, names, color=BLACK), NAMES).loc[('logit','all')]
    assert read.beaten==1 and read.low>0 and read.p<1e-6 and abs(read.matched)<1e-9
    corner = torch.zeros(30,32,32); corner[:,0,0] = 1
    far = [i for i,k in enumerate(m) if not any(box_mask(r, 32)[0,0] for r in (k.experts,*k.sets))]
    pick = lambda t: [t[i] for i in far]
    none = box_test(Inside(corner).eval(), x[far], pick(m), y[far], pick(names), pick(names), color=BLACK)
    assert len(far)>5 and (none['drop']==0).all() and (none.beaten==.5).all() and (none.p==1).all()

def test_false_alarms_are_as_many_as_they_should_be():
    "Boxes at random, models with random weights: differences are symmetric, and five of a hundred tests say otherwise."
    alarms,all_differences,ranks = [],[],[]
    for rep in range(40):
        x,b,names = simulated(20, 1000+rep); m = matched_sets(b, names, 32, n=9, seed=rep)
        r = box_test(linear(seed=rep), x, m, torch.zeros(20, dtype=torch.long), names, names, color=BLACK).query("output=='logit' and n>0")
        alarms.append(stats.ttest_1samp(r.difference, 0).pvalue<.05)
        all_differences.append(r.difference); ranks.append(r.beaten)
    d,k = np.concatenate(all_differences),np.concatenate(ranks)
    positive,skew,share = (d>0).mean(),stats.skew(d),np.mean(alarms)
    print(f'{len(d)} images: {positive:.3f} positive, skewness {skew:.2f}, mean rank {k.mean():.3f}, false alarms {share:.3f}')
    assert abs(positive-.5)<3*.5/len(d)**.5 and abs(k.mean()-.5)<3*k.std()/len(d)**.5 and share<=.05+3*(.05*.95/40)**.5

@pytest.mark.parametrize('name', ('tiny-clip-random','tiny-dinov2-random'))
def test_untrained_backbones_do_not_care(name, data):
    b = load_backbone(name); model = StyleModel(b, new_classifier(b.dim)).eval()
    items = [data.loader('eval').dataset[i] for i in range(12)]
    x,y,names = torch.stack([i['image'] for i in items]),torch.tensor([i['label'] for i in items]),[i['name'] for i in items]
    r = box_test(model, x, matched_sets([i['boxes'] for i in items], names, 96, n=10), y, names, names, color=b.spec.mean)
    assert box_summary(r, NAMES).p[('logit','all')]>.001 and abs(r.query("output=='logit'").beaten.mean()-.5)<.35

def test_models_are_left_as_they_were(data, images):
    b = load_backbone('tiny-siglip'); model = StyleModel(b, new_classifier(b.dim)).eval()
    state = {k:v.clone() for k,v in model.state_dict().items()}; grads = [p.requires_grad for p in model.parameters()]
    y,names = torch.tensor([0,1,2,3]),names_of(4); m = matched_sets([torch.tensor([[10.,10.,30.,40.]])]*4, names, 96, n=2); before = images.clone()
    box_test(model, images, m, y, names, names, color=b.spec.mean); perturbation_curves(model, images, torch.rand(4,12,12), y, names, names, 2, 'blur')
    assert all(torch.equal(v, state[k]) for k,v in model.state_dict().items()) and torch.equal(images, before)
    assert [p.requires_grad for p in model.parameters()]==grads and all(p.grad is None for p in model.parameters())
    assert not any(k.training for k in model.modules()) and torch.is_grad_enabled()

# ---- summaries, and two models

def made_up(n=24, seed=0):
    "Results as `box_test` gives them: two photographs of a church, four styles, one image without room."
    rng = np.random.default_rng(seed)
    r = pd.DataFrame(dict(image=[f'Q{k//2}_wd{k%2}.jpg' for k in range(n)], church=[f'Q{k//2}' for k in range(n)], label=np.arange(n)//2%4, output='logit', n=10,
                          drop=rng.normal(.5,1,n), matched=rng.normal(0,.3,n), beaten=rng.uniform(0,1,n), note=''))
    r['difference'] = r['drop']-r.matched
    r.loc[3,['n','matched','difference','beaten']] = 0,np.nan,np.nan,np.nan
    return r

def test_summary_is_the_paired_test_over_churches():
    r = made_up(); s = box_summary(r, NAMES)
    kept = r[r.n>0].groupby('church')[['drop','matched','beaten']].mean()
    t = stats.ttest_rel(kept['drop'], kept.matched); row = s.loc[('logit','all')]
    assert (row.images,row.no_room,row.n)==(24,1,12) and np.isclose(row.p, t.pvalue) and np.isclose(row.difference, (kept['drop']-kept.matched).mean()) and np.isclose(row.beaten, kept.beaten.mean())
    assert [k for _,k in s.index]==['all',*NAMES] and s.n.iloc[1:].sum()==12 and s.images.iloc[1:].sum()==24 and np.isnan(row.p_holm)
    p = np.sort(s.p.iloc[1:]); holm = np.minimum(1, np.maximum.accumulate(p*[4,3,2,1]))
    assert np.allclose(np.sort(s.p_holm.iloc[1:]), holm)
    few = box_summary(r[(r.label!=2)|(r.church=='Q2')], NAMES).loc[('logit','Renaissance')]
    assert few.n==1 and np.isnan(few.p) and few.note=='too few churches'

def test_before_and_after_use_the_same_matched_boxes():
    x,b,names = simulated(12, 3); y = torch.zeros(12, dtype=torch.long); m = matched_sets(b, names, 32, n=8)
    first,second = linear(seed=1),linear(seed=2)
    results,changes,table = before_and_after(first, second, x, m, y, names, names, color=BLACK)
    for when,model in dict(before=first, after=second).items():
        pd.testing.assert_frame_equal(results[results.when==when].drop(columns='when').reset_index(drop=True), box_test(model, x, m, y, names, names, color=BLACK))
    one = changes[(changes.output=='logit')&(changes.score=='difference')]
    wide = results[results.output=='logit'].pivot(index='image', columns='when', values='difference').loc[one.image]
    assert np.allclose(one.change, wide.after-wide.before) and len(one)==12
    ordered = one.sort_values('church'); wanted = paired_shift(ordered.before, ordered.after)
    assert np.allclose(table.loc[('logit','difference'),['change','low','high','p']].astype(float), [wanted[k] for k in ('shift','low','high','p')])
    assert before_and_after(first, first, x, m, y, names, names, color=BLACK)[2].change.eq(0).all()

def test_what_can_be_compared():
    "Logits scaled by a factor: differences of logits scale with them, the share of matched sets beaten stays."
    x,b,names = simulated(12, 3); y = torch.zeros(12, dtype=torch.long); m = matched_sets(b, names, 32, n=8); model = linear(seed=1)
    _,changes,_ = before_and_after(model, lambda v: 3*model(v)+7, x, m, y, names, names, color=BLACK)
    of = lambda s: changes[(changes.output=='logit')&(changes.score==s)]
    assert np.allclose(of('difference').after, 3*of('difference').before) and (of('beaten').change==0).all()
    assert not np.allclose(changes[(changes.output=='log_probability')&(changes.score=='difference')].change, 0)

# ---- refusals

def test_refusals():
    x,y,names,model = pictures(2),torch.tensor([0,1]),names_of(2),linear(); maps = torch.rand(2,8,8); m = matched_sets([torch.tensor([[2.,3.,9.,12.]])]*2, names, 32, n=2)
    for message,call in {
        r'expected \(n, 3, s, s\)': lambda: blank_images(x[:,:1], color=GRAY),
        "expected 'gray' or 'blur'": lambda: blank_images(x, 'black'),
        'needs three values': lambda: blank_images(x),
        'leave it out': lambda: blank_images(x, 'blur', GRAY),
        'masks are torch.float32': lambda: occlude(x, torch.zeros(2,32,32), color=GRAY),
        'one for each image': lambda: occlude(x, torch.zeros(2,8,8,dtype=torch.bool), color=GRAY),
        'not finite': lambda: perturbation_curves(model, x, maps/0, y, names, names, color=GRAY),
        r'expected \(n, g, g\)': lambda: perturbation_curves(model, x, maps[:,None], y, names, names, color=GRAY),
        'grid that divides 32': lambda: perturbation_curves(model, x, torch.rand(2,7,7), y, names, names, color=GRAY),
        'expected 2, on a grid': lambda: perturbation_curves(model, x, maps[:1], y, names, names, color=GRAY),
        'expected 1 to 64': lambda: perturbation_curves(model, x, maps, y, names, names, 65, color=GRAY),
        'without a class': lambda: perturbation_curves(model, x, maps, torch.tensor([0,-1]), names, names, color=GRAY),
        'classes 0 to 2': lambda: box_test(model, x, m, torch.tensor([0,3]), names, names, color=GRAY),
        'the same number': lambda: box_test(model, x, m, y, names[:1], names, color=GRAY),
        'stands twice': lambda: box_test(model, x, m, y, names[:1]*2, names, color=GRAY),
        'match boxes at the images': lambda: box_test(model, x, matched_sets([torch.tensor([[2.,3.,9.,12.]])]*2, names, 48, n=2), y, names, names, color=GRAY),
        'all finite': lambda: box_test(lambda v: model(v)/0, x, m, y, names, names, color=GRAY),
        'batch is 0': lambda: box_test(model, x, m, y, names, names, color=GRAY, batch=0),
        'model.eval': lambda: box_test(linear().train(), x, m, y, names, names, color=GRAY),
        'does not divide': lambda: occlusion_maps(model, x, y, 5, color=GRAY),
        'of 5 does not divide': lambda: box_maps([torch.zeros(1,4)], 32, 5),
        r'expected \(k, 4\)': lambda: pixel_rectangles(torch.zeros(4), 32),
        'holds a pixel': lambda: matched_boxes(torch.tensor([[1.6,1.,1.9,9.]]), 32, seeded(0)),
        'share in': lambda: matched_boxes(torch.tensor([[1.,1.,2.,9.]]), 32, seeded(0), tolerance=1.),
        'of one model': lambda: box_summary(pd.concat([made_up(), made_up()]), NAMES),
        '2 names': lambda: matched_sets([torch.zeros(1,4)], names, 32)}.items():
        with pytest.raises(ValueError, match=message): call()
    part = nn.Sequential(linear(), nn.Dropout()).eval(); part[1].train() # one busy module is enough
    with pytest.raises(ValueError, match='1 is in training mode'): box_test(part, x, m, y, names, names, color=GRAY)

# ---- real weights and photographs

def test_real_vit_tiny(real):
    b = load_backbone(f"timm/vit_tiny_patch16_224@{real/'vit_tiny_in1k/model.safetensors'}")
    churches = load_churches(real/'photos', verify=False); split = make_split(churches)
    data = TrainData(churches, replace(split, train=split.train[::12], val=split.val[::4], eval=split.eval[::12]), 224)
    train,val = (pooled_features(b, data.loader(p)) for p in ('train','val'))
    model = StyleModel(b, logistic_probe(train, val, torch.ones(4))[0]).eval()
    items = [data.loader('eval').dataset[i] for i in range(len(data.split.eval))]
    x,y,names = torch.stack([i['image'] for i in items]),torch.tensor([i['label'] for i in items]),[i['name'] for i in items]
    matched = matched_sets([i['boxes'] for i in items], names, 224, n=6)
    for m in matched: check(m, 224)
    r = box_test(model, x, matched, y, names, data.churches.groups(names), color=b.spec.mean)
    maps = dict(attention=pooled_maps(b, x)[:,-1].mean(1), random=torch.rand(len(x),14,14,generator=seeded(0)),
                occlusion=occlusion_maps(model, x, y, 4, color=b.spec.mean))
    curves = pd.concat({k:perturbation_curves(model, x, v, y, names, names, 4, color=b.spec.mean) for k,v in maps.items()}, names=['order']).reset_index('order')
    with torch.no_grad(): p = model(x).double().softmax(1).gather(1, y[:,None])[:,0].numpy()
    start = curves[(curves.order=='attention')&(curves.curve=='deletion')&(curves.step==0)].probability.to_numpy()
    assert np.array_equal(start, p) and np.allclose(r[r.output=='logit'].probability, p)
    assert r.correct.mean()>.5 and r[r.n>0][['drop','matched','p']].notna().all().all() and r[r.n<6].note.ne('').all()
    a = curve_areas(curves).groupby(['curve','order']).area.mean()
    print(r.groupby('output')[['drop','matched','difference','beaten']].mean().round(3).to_dict('index'), a.round(3).to_dict())
    assert a['deletion','occlusion']<a['deletion','random'] and a['insertion','occlusion']>a['insertion','random']
