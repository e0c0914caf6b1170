"Planted attention: what is moved, what metrics answer, and which share a study would notice."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from ssl_wikichurches.attention.scores import score_maps
from ssl_wikichurches.stats.planted import box_shares, detectable_mass, dose_response, mass_of_shift, move_mass, moved_mass, planted_power, planted_scores

SIZE,GRID = 32,8

@pytest.fixture(scope='module')
def study():
    "Twelve images of ten churches: maps, boxes, names, size, groups."
    g = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 20, (12,2), generator=g).float()
    boxes = [torch.cat([c, c+torch.tensor([10.,8.])])[None] for c in corner]
    return torch.rand(12, GRID, GRID, generator=g), boxes, [f'i{k}' for k in range(12)], SIZE, [f'c{k%10}' for k in range(12)]

@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_mass_is_moved_and_none_is_lost(share, seed):
    g = torch.Generator().manual_seed(seed)
    x,to = torch.rand(3, GRID, GRID, generator=g),(torch.rand(3, GRID, GRID, generator=g)>.6).float()
    out,moved = move_mass(x, to, share)
    assert torch.allclose(out.sum((-2,-1)), torch.ones(3, dtype=torch.double)) and (out>=-1e-15).all() and torch.allclose(moved, torch.full((3,), share, dtype=torch.double))
    p = x.double()/x.double().sum((-2,-1), keepdim=True)
    inside = (p*(to>0)).sum((-2,-1))
    assert torch.allclose((out*(to>0)).sum((-2,-1)), inside+share*(1-inside)) # what came in, less what was taken there
    assert (moved_mass(x, out)<=share+1e-12).all()

def test_a_source_gives_what_it_has():
    x,to,corner = torch.ones(4, 4),torch.zeros(4, 4),torch.zeros(4, 4, dtype=torch.bool)
    to[3,3],corner[0,0] = 1,True
    out,moved = move_mass(x, to, .5, corner)
    assert moved.item()==pytest.approx(1/16) and out[0,0]==0 and out[3,3].item()==pytest.approx(2/16)
    assert torch.equal(move_mass(x, to, .5, torch.zeros_like(corner))[0], x.double()/16) # nothing there, nothing moved

def test_shares_of_patches_are_areas(study):
    maps,boxes,*_ = study
    for share,b in zip(box_shares(boxes, SIZE, GRID), boxes):
        l,t,r,d = b[0].tolist()
        by_hand = np.array([[max(0, min(r,4*x+4)-max(l,4*x))*max(0, min(d,4*y+4)-max(t,4*y))/16 for x in range(GRID)] for y in range(GRID)])
        assert np.allclose(share.numpy(), by_hand)

def test_response_is_that_of_maps_made_by_hand(study):
    maps,boxes,names,size,groups = study
    t = dose_response(maps, boxes, names, size, groups, doses=(.1,), only=['iou@90','coverage']).set_index(['source','metric'])
    to = torch.stack([torch.from_numpy(s) for s in box_shares(boxes, size, GRID).numpy()])
    p = maps.double()/maps.double().sum((-2,-1), keepdim=True)
    by_hand = .9*p+.1*to/to.sum((-2,-1), keepdim=True)
    for m in ('iou@90','coverage'):
        before,after = (score_maps(x.float(), boxes, names, size, groups=groups, only=[m]).value.mean() for x in (p,by_hand))
        assert t.loc[('everywhere',m),'shift']==pytest.approx(after-before, abs=1e-6)

def test_a_shift_and_its_mass_are_each_others_inverse(study):
    maps,boxes,names,size,groups = study
    t = dose_response(maps, boxes, names, size, groups, doses=(.03,), sources={'everywhere':None}, only=['coverage'])
    assert mass_of_shift(maps, boxes, names, size, t['shift'], 'coverage', groups)==pytest.approx([.03], rel=.02)

def test_more_churches_more_seeds_and_less_wandering_show_less(study):
    share = lambda **how: detectable_mass(*study, metrics=('iou@90',), **how).share.item()
    assert share(n=139)<share(n=40) and share(moved=.05)<share(moved=.2) and share(seeds=(5,))<share(seeds=(1,)) and share(alpha=.05/12)>share()
    assert np.isnan(share(n=3, alpha=.0001))

def test_power_is_kept_and_no_share_is_no_shift(study):
    r = detectable_mass(*study, metrics=('iou@90',), n=60, draws=16).iloc[0]
    for share,low,high in ((r.share,.7,.9), (0.,0.,.06)):
        scores = planted_scores(*study, shares=(0,share), draws=60, seed=5)['iou@90']
        assert low<=planted_power(scores[:,0], scores[:,1], n=60, studies=1000)<=high

@pytest.mark.parametrize('peaked', (1,12))
def test_the_share_does_not_hang_on_where_it_was_looked_for(study, peaked, monkeypatch):
    "A rank answers the first thousandths most: read off between shares that lie far apart, the share would be found too often."
    monkeypatch.setattr('ssl_wikichurches.stats.planted.SHARES', (0,.02,.04,.08,.16,.32))
    study,how = (study[0]**peaked,*study[1:]),dict(metrics=('shuffled_auroc',), moved=.05, draws=11)
    share = detectable_mass(*study, n=60, **how).share.item()
    before,after = planted_scores(*study, shares=(0,share), seed=5, **how)['shuffled_auroc'].swapaxes(0, 1)
    assert .77<=planted_power(before, after, n=60)<=.83

def test_what_is_refused(study):
    maps,boxes,names,size,groups = study
    with pytest.raises(ValueError, match='one church'): detectable_mass(maps, boxes, names, size, ['c']*12)
    with pytest.raises(ValueError, match='0 < alpha < power'): detectable_mass(*study, power=.01)
    with pytest.raises(ValueError, match='from 0 to 1'): move_mass(maps, maps, 1.5)
    with pytest.raises(ValueError, match='expected attention'): move_mass(-maps, maps, .5)
