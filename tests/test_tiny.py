"The tiny backbones: what they are shown, how they are pretrained, what ships."
import hashlib, json
import numpy as np, pytest, torch
from safetensors.torch import load_file
from ssl_wikichurches.backbones import encoders as backbones
from ssl_wikichurches.backbones import tiny
from ssl_wikichurches.backbones.encoders import BACKBONES, TINY, WEIGHTS, load_backbone, save_backbone
from ssl_wikichurches.backbones.probe import balanced_accuracy, fit_probe, probe_churches, probe_table
from ssl_wikichurches.data.synthetic import make_churches, read_truth
from ssl_wikichurches.backbones.tiny import AnchoredDistillation, Distillation, Optimizer, Teacher, balanced_assignment, encode, objective_of, pretrain
from ssl_wikichurches.data.views import CAPTION_LENGTH, PARTS, WORDS, Photographs, caption, load_photographs, parts_in_view, views, windows

families = pytest.mark.parametrize('family', [k.removeprefix('tiny-') for k in TINY])
def generator(seed=0): return torch.Generator().manual_seed(seed)

@pytest.fixture(scope='module')
def photos(tmp_path_factory): return load_photographs(make_churches(tmp_path_factory.mktemp('photos')/'set', n=32, n_annotated=0, seed=9))

@pytest.fixture
def batches(monkeypatch):
    "Of 24 photographs, whatever the objective takes."
    for kind in {objective_of(n.removeprefix('tiny-')) for n in TINY}: monkeypatch.setattr(kind, 'batch', 24)

# ---- views, windows, captions

def test_photographs_hold_the_clear_parts(tmp_path):
    folder = make_churches(tmp_path/'set', n=6, n_annotated=0, seed=4)
    photos,truth = load_photographs(folder),read_truth(folder)
    for i,name in enumerate(sorted(p.name for p in (folder/'images').iterdir())):
        rows = truth[(truth.image==name)&truth.clear]
        k = photos.parts[i]>=0
        assert sorted(PARTS[p] for p in photos.parts[i][k])==sorted(rows.part)
        np.testing.assert_allclose(photos.boxes[i][k][:,2]-photos.boxes[i][k][:,0], rows.width, atol=1e-6)

def test_boxes_go_along_with_the_view():
    "A white square on black: wherever it lands, the box lies on it."
    painted = torch.zeros(1,3,96,96, dtype=torch.uint8); painted[:,:,10:40,50:90] = 255
    photos = Photographs(painted, torch.tensor([[0]]), torch.tensor([[[50,10,90,40]]])/96)
    images,boxes = views(photos, torch.zeros(100).long(), generator(), area=(.3,1.), light=0.)
    edges = (boxes[:,0]*96).round().clamp(0,96).long()
    for image,(x0,y0,x1,y1) in zip(images, edges.tolist()):
        mask = torch.zeros(96,96, dtype=torch.bool); mask[y0:y1,x0:x1] = True
        white = image[0]>.5
        assert mask.sum()<200 or white[mask].float().mean()>.9
        assert (white&~mask).sum()<.1*white.sum()+100 # a rim of interpolation, and no mirror image at the border

def test_windows_are_squares_of_the_grid():
    patches,frames = windows(500, 5, 12, generator())
    rows,columns = patches//12,patches%12
    assert patches.shape==(500,25) and (rows.max(1).values-rows.min(1).values==4).all() and (columns.max(1).values-columns.min(1).values==4).all()
    torch.testing.assert_close(frames, torch.stack([columns.min(1).values, rows.min(1).values, columns.max(1).values+1, rows.max(1).values+1], 1)/12)
    assert rows.min()==columns.min()==0 and rows.max()==columns.max()==11

def test_parts_in_view_counts_half_seen_boxes():
    boxes = torch.tensor([[[.1,.1,.3,.3],[.39,.1,.59,.3],[.45,.1,.65,.3],[.1,.1,.2,.2]]])
    photos = Photographs(torch.zeros(1,3,96,96, dtype=torch.uint8), torch.tensor([[3,3,3,-1]]), boxes)
    counts = parts_in_view(photos, torch.tensor([0]), boxes, torch.tensor([[0,0,.5,1.]]))
    assert counts.sum()==counts[0,3]==2 # the second box is seen by more than half, the third by a quarter, the fourth is none

def test_captions_name_every_part_once(photos):
    for i in range(30):
        counts = torch.zeros(len(PARTS)); some = torch.randperm(len(PARTS), generator=generator(i))[:3]; counts[some] = torch.tensor([1.,2.,5.])
        text = ' '.join(WORDS[t] for t in caption(counts, generator(i)) if t)
        for k,number in zip(some, ('one','two','several')): assert f'{number} {PARTS[k].lower()}' in text
        assert text.startswith('<start> ') and text.endswith(' <end>') and len(caption(counts, generator(i)))==CAPTION_LENGTH
    full = caption(torch.ones(len(PARTS)), generator())
    assert len(full)==CAPTION_LENGTH and WORDS[full[-1]]=='<end>'

# ---- pretraining

@families
def test_two_runs_are_one(family, photos, batches):
    torch.manual_seed(1); state,threads = torch.get_rng_state(),torch.get_num_threads()
    a,first = pretrain(family, photos, steps=2)
    torch.set_num_threads(1)
    b,second = pretrain(family, photos, steps=2)
    torch.set_num_threads(threads)
    assert first==second and all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values()))
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads()==threads

@families
def test_every_weight_is_trained(family, photos, batches):
    start,_ = pretrain(family, photos, steps=1); later,_ = pretrain(family, photos, steps=2)
    same = [k for (k,a),b in zip(start.state_dict().items(), later.state_dict().values()) if torch.equal(a,b)]
    spare = ('mask_token',) if family in ('dinov2','dinov3') else ()
    fixed = ('position',) if family=='mae' else ()
    assert [k for k in same if not any(s in k for s in (*spare,*fixed,'position_ids','k_proj.bias'))]==[], same

@pytest.mark.parametrize('family', ('clip','siglip','siglip2','mae','supervised'))
def test_training_lowers_the_loss(family, photos, batches):
    _,losses = pretrain(family, photos, steps=15)
    assert np.mean(losses[-5:])<np.mean(losses[:5])

def test_mae_sees_everything_after_pretraining(photos):
    b,_ = pretrain('mae', photos, steps=1)
    assert b.model.config.mask_ratio==0 and b.model(torch.zeros(1,3,96,96)).last_hidden_state.shape[1]==145

def test_gram_anchor_enters_late(photos):
    b = load_backbone('tiny-dinov3-random'); o = AnchoredDistillation(b, photos)
    o.after(.5); assert o.anchor is None
    o.after(.6); anchor = o.anchor; assert anchor is not None
    o.after(.9); assert o.anchor is anchor
    with torch.no_grad():
        args = lambda: (torch.arange(8), generator(1))
        with_it = o.loss(*args()); o.anchor = None; without = o.loss(*args())
    assert with_it>=without

def test_teacher_follows_and_is_no_parameter(photos):
    net = torch.nn.Linear(3,2); teacher = Teacher(net); old = teacher.modules[0].weight.clone()
    with torch.no_grad(): net.weight.add_(1.)
    teacher.follow(.75, net)
    torch.testing.assert_close(teacher.modules[0].weight, old+.25)
    o = Distillation(load_backbone('tiny-dinov2-random'), photos)
    assert not {id(p) for p in o.parameters()}&{id(p) for m in o.teacher.modules for p in m.parameters()}

@families
def test_optimizer_takes_every_parameter_once(family, photos):
    o = objective_of(family)(load_backbone(f'tiny-{family}-random'), photos)
    held = [id(p) for opt in Optimizer(o, 1e-3, .01).all for g in opt.param_groups for p in g['params']]
    assert len(held)==len(set(held)) and set(held)=={id(p) for p in o.parameters() if p.requires_grad}

@pytest.mark.parametrize('name', [n+'-random' for n in TINY if n!='tiny-mae'])
def test_patches_outside_a_window_do_not_matter(name):
    b = load_backbone(name); x = torch.rand(2,3,96,96, generator=generator())
    patches,_ = windows(2, 6, 12, generator(2)); y = x.clone()
    inside = torch.zeros(2,144, dtype=torch.bool).scatter_(1, patches, True).view(2,1,12,12).repeat_interleave(8,2).repeat_interleave(8,3)
    y[~inside.expand_as(y)] = 0.
    with torch.no_grad():
        assert torch.equal(encode(b, x, patches)[0], encode(b, y, patches)[0])
        y[inside.expand_as(y)] *= .5
        assert not torch.equal(encode(b, x, patches)[0], encode(b, y, patches)[0])
    assert not any(m._forward_hooks for m in b.model.modules())

def test_balanced_assignment_is_balanced():
    q = balanced_assignment(torch.randn(60,5, generator=generator())+torch.tensor([3.,0,0,0,0]), .2, rounds=50)
    torch.testing.assert_close(q.sum(0), torch.full((5,), 12.), atol=.05, rtol=0)

# ---- what ships

@pytest.mark.parametrize('name', TINY)
def test_shipped(name):
    folder = WEIGHTS/name
    tensors = load_file(folder/'backbone.safetensors')
    assert {v.dtype for v in tensors.values()}=={torch.float16} and all(v.isfinite().all() for v in tensors.values())
    assert (folder/'backbone.safetensors').stat().st_size<2e6
    card = (folder/'README.md').read_text(); family = name.removeprefix('tiny-')
    assert hashlib.sha256((folder/'backbone.safetensors').read_bytes()).hexdigest() in card
    assert f'wikichurches_pretrain_tiny --family {family}' in card and all(d in card for d in objective_of(family).deviations)
    assert f'{objective_of(family).steps} steps' in card
    b = load_backbone(name)
    assert b.spec==BACKBONES[name] and {p.dtype for p in b.parameters()}=={torch.float32}
    other = load_backbone(name+'-random')
    assert other.state_dict().keys()==b.state_dict().keys() and not torch.equal(next(other.parameters()), next(b.parameters()))

def test_all_weights_together_are_small(): assert sum(p.stat().st_size for p in WEIGHTS.rglob('*'))<8e6

def test_missing_weights_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(backbones, 'WEIGHTS', tmp_path)
    with pytest.raises(FileNotFoundError, match='wikichurches_pretrain_tiny --family clip'): load_backbone('tiny-clip')

def test_rounding_on_saving(tmp_path):
    b = load_backbone('tiny-clip-random'); save_backbone(b, tmp_path, torch.float16)
    for k,v in load_backbone(tmp_path).state_dict().items(): assert torch.equal(v, b.state_dict()[k].half().float()) or not v.is_floating_point()

def test_made_anew(monkeypatch, tmp_path, photos):
    "Draw, pretrain, save, write the card, load; with less of everything."
    monkeypatch.setattr(tiny, 'load_photographs', lambda folder: photos); monkeypatch.setattr(tiny, 'synthetic_folder', lambda *a, **k: None)
    folder = tiny.make_tiny('supervised', tmp_path, steps=2)
    b = load_backbone(folder)
    assert b.spec.name=='tiny-supervised' and json.loads((folder/'backbone.json').read_text())['spec']['source']=='package/tiny-supervised'
    assert '2 steps of 64' in (folder/'README.md').read_text()

# ---- the probe

def test_probe_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0); y = np.arange(400)%4
    noise = rng.normal(size=(400,6)); signal = noise.copy(); signal[:,0] += 4*(y==1); signal[:,1] += 4*(y==2); signal[:,2] += 4*(y==3)
    train,test = slice(0,200),slice(200,400)
    assert balanced_accuracy(y[test], fit_probe(signal[train], y[train]).predict(signal[test]))[0]>.85
    score,error = balanced_accuracy(y[test], fit_probe(noise[train], y[train]).predict(noise[test]))
    assert abs(score-.25)<4*error

def test_probe_table_tests_on_unseen_churches():
    images,labels = probe_churches(40)
    t = probe_table(['tiny-siglip-random'], images, labels)
    assert list(t.index)==[('pixels','pixels'), ('tiny-siglip-random','pooled'), ('tiny-siglip-random','blocks')] and (t.n_train==20).all() and (t.n_test==20).all()
    assert t.balanced_accuracy.between(0,1).all()
