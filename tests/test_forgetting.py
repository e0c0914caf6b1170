"CKA against textbook formulas, the held-out task against the plans of its churches, and files of features that must fit each other."
import itertools, multiprocessing, os
from dataclasses import replace
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from ssl_wikichurches.backbones import forgetting
from ssl_wikichurches.backbones.encoders import load_backbone
from ssl_wikichurches.data.churches import ChurchDataset, eval_transform, read_churches
from ssl_wikichurches.backbones.forgetting import (ANSWERS, HELD_OUT_SEED, FeatureHeader, RunFeatures, forgetting_scores, held_out_churches, held_out_task,
                                         knn_accuracy, linear_cka, load_features, run_features, save_features)
from ssl_wikichurches.data.download import EDITIONS
from ssl_wikichurches.data.synthetic import DRAWN_STYLES, plan_church
from ssl_wikichurches.backbones.tiny import DRAWN
from ssl_wikichurches.finetune.controls import randomly_initialized

close = lambda x, y, tol=1e-9: np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=tol, rtol=0)
normal = lambda seed, *shape: np.random.default_rng(seed).normal(size=shape)

# ---- alignment

def biased_oracle(x, y): # tr(KHLH), the textbook estimate
    h = np.eye(len(x))-1/len(x)
    hsic = lambda a, b: np.trace(a@a.T@h@b@b.T@h)
    return hsic(x, y)/np.sqrt(hsic(x, x)*hsic(y, y))

def debiased_oracle(x, y): # means over pairs, triples and quadruples of different images, one by one
    def hsic(a, b):
        k,l,n = a@a.T,b@b.T,range(len(a))
        pairs = np.mean([k[i,j]*l[i,j] for i,j in itertools.permutations(n, 2)])
        triples = np.mean([k[i,j]*l[i,q] for i,j,q in itertools.permutations(n, 3)])
        quadruples = np.mean([k[i,j]*l[q,r] for i,j,q,r in itertools.permutations(n, 4)])
        return pairs-2*triples+quadruples
    return hsic(x, y)/np.sqrt(hsic(x, x)*hsic(y, y))

@pytest.mark.parametrize('n,d,e', [(4,3,3), (6,2,9), (8,20,5)])
def test_cka_is_the_textbook_ratio(n, d, e):
    x = normal(n, n, d)+3; y = np.c_[x[:,:2],normal(n+1, n, e)]
    close(linear_cka(x, y), debiased_oracle(x, y)); close(linear_cka(x, y, debiased=False), biased_oracle(x, y))
    assert abs(linear_cka(x, y)-linear_cka(x, y, debiased=False))>.01 # the two are told apart

@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(1e-4, 1e4), st.floats(-1e3, 1e3), st.booleans())
def test_cka_does_not_see_rotation_scale_and_origin(seed, scale, shift, debiased):
    x,y = normal(seed, 20, 7),normal(seed+1, 20, 4); y[:,0] += x[:,0]
    turn,order = np.linalg.qr(normal(seed+2, 7, 7))[0],np.random.default_rng(seed).permutation(20)
    value = linear_cka(x, y, debiased)
    close(linear_cka(scale*x@turn+shift, y, debiased), value, 1e-6); close(linear_cka(y, x, debiased), value); close(linear_cka(x[order], y[order], debiased), value)
    close(linear_cka(x, scale*x@turn+shift, debiased), 1, 1e-6)
    assert abs(linear_cka(x, y[order], debiased)-value)>1e-6 # which image is which does matter

def test_unrelated_features_with_more_dimensions_than_images():
    found = np.array([[linear_cka(normal(2*s, 60, 768), normal(2*s+1, 60, 512), b) for b in (True,False)] for s in range(20)])
    assert abs(found[:,0].mean())<.02 and found[:,0].min()<0 and found[:,1].min()>.85

def test_cka_in_single_precision_and_far_from_the_origin():
    x,y = normal(0, 30, 50).astype('float32'),normal(1, 30, 50).astype('float32'); y[:,:20] += x[:,:20]
    close(linear_cka(x+np.float32(1000), y), linear_cka(x, y), 1e-3); close(linear_cka(torch.tensor(x), torch.tensor(y)), linear_cka(x, y))
    close(linear_cka(x*1e-20, y*1e30), linear_cka(x, y), 1e-6) # the squares of neither fit single precision

def test_cka_refuses():
    x = normal(0, 8, 3)
    for a,b,why in ((x, x[:7], '8 and 7 images'), (x[:3], x[:3], '3 images are too few'), (x, x[:,0], 'expected \\(n, dim\\)'), (x, x*np.nan, 'finite'),
                    (x, 0*x, 'features of all images are the same'), (x+0*x, 0*x+7.3, 'are the same'), (x, np.eye(8), 'equally far apart')):
        with pytest.raises(ValueError, match=why): linear_cka(a, b)
    with pytest.raises(ValueError, match='1 images are too few'): linear_cka(x[:1], x[:1], debiased=False)
    linear_cka(x[:4], x[:4]); linear_cka(x[:3], x[:3], debiased=False)

# ---- neighbors

@pytest.mark.parametrize('k', [1,5,9])
def test_neighbors_by_brute_force(k):
    x,y,z,w = normal(0, 40, 6),np.arange(40)%3,normal(1, 30, 6),np.arange(30)%3
    x += 1.2*np.eye(6)[y]; z += 1.2*np.eye(6)[w]
    said = []
    for a in z:
        cosine = [a@b/np.sqrt(a@a*(b@b)) for b in x]
        votes = [y[i] for i in sorted(range(40), key=lambda i: -cosine[i])[:k]]
        said.append(max((0,1,2), key=votes.count)) # a tie goes to the first
    recall = [np.mean([s==c for s,t in zip(said, w) if t==c]) for c in range(3)]
    score,error = knn_accuracy(x, y, z, w, k)
    close(score, np.mean(recall)); close(error, np.sqrt(sum(r*(1-r)/10 for r in recall))/3)
    lengths = np.random.default_rng(0).uniform(.1, 10, (40,1))
    assert knn_accuracy(x*lengths, y, z*3, w, k)==(score,error)

def test_neighbors_refuse():
    x,y = normal(0, 10, 3),np.arange(10)%2
    for k in (0,11):
        with pytest.raises(ValueError, match=f'k is {k}: expected 1 to 10'): knn_accuracy(x, y, x, y, k)
    for a,b in ((x*np.inf,x), (x,x*np.nan)):
        with pytest.raises(ValueError, match='diverged'): knn_accuracy(a, y, b, y, 3)

# ---- the held-out task

def test_answers_are_those_of_the_plans_and_say_nothing_of_style():
    found = held_out_churches(96)
    for i,answer,style,half in found:
        assert plan_church(DRAWN_STYLES[style], np.random.default_rng([HELD_OUT_SEED,i,0]))['towers']==ANSWERS[answer]
    cells = [(answer,style,half) for _,answer,style,half in found]
    assert {cells.count(c) for c in itertools.product(range(2), range(4), range(2))}=={6}
    assert len({i for i,*_ in found})==96 and held_out_churches(96)==found

def test_no_edition_has_the_seed_of_the_task():
    assert HELD_OUT_SEED not in {e['seed'] for e in EDITIONS.values()}|{DRAWN['seed'], 2}

@pytest.mark.parametrize('n', [0,-16,8,100])
def test_a_task_that_cannot_be_balanced(n, tmp_path, monkeypatch):
    monkeypatch.setenv('WIKICHURCHES_CACHE', str(tmp_path))
    with pytest.raises(ValueError, match='multiple of 16'): held_out_task(96, n)
    assert not [*tmp_path.iterdir()]

def draw_at_once(cache):
    os.environ['WIKICHURCHES_CACHE'] = cache
    return held_out_task(96, 16)[0].sum().item()

def test_two_processes_draw_the_same_file(tmp_path, monkeypatch):
    with multiprocessing.get_context('spawn').Pool(2) as pool: sums = pool.map(draw_at_once, [str(tmp_path/'cache')]*2, 1)
    files = [*(tmp_path/'cache').iterdir()]
    monkeypatch.setenv('WIKICHURCHES_CACHE', str(tmp_path/'other'))
    images,answers,train = held_out_task(96, 16)
    assert len(files)==1 and sums==[images.sum().item()]*2 and files[0].read_bytes()==(tmp_path/'other'/files[0].name).read_bytes()
    assert sorted(zip(answers, train))==[(a,h) for a in (0,1) for h in (False,True) for _ in range(4)]

def test_sizes_and_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('WIKICHURCHES_CACHE', str(tmp_path))
    whole,answers,train = held_out_task(96, 16)
    small,again,_ = held_out_task(48, 16)
    assert whole.dtype==small.dtype==torch.uint8 and small.shape==(16,3,48,48) and (again==answers).all() and len([*tmp_path.iterdir()])==1
    halves = torch.nn.functional.avg_pool2d(whole.float(), 2)
    assert (halves-small.float()).abs().mean()<4
    monkeypatch.setattr(forgetting, '_draw_task', lambda *_: pytest.fail('drawn again'))
    assert torch.equal(held_out_task(96, 16)[0], whole)
    (file,) = tmp_path.iterdir(); file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match='is damaged'): held_out_task(96, 16)

def test_larger_inputs_are_drawn_larger(tmp_path, monkeypatch):
    monkeypatch.setenv('WIKICHURCHES_CACHE', str(tmp_path))
    assert held_out_task(160, 16)[0].shape==(16,3,160,160) and held_out_task(224, 16)[0].shape==(16,3,224,224)
    assert [p.name for p in tmp_path.iterdir()]==[f'{forgetting._edition(160, 16)}.safetensors'] and forgetting._edition(160, 16)!=forgetting._edition(96, 16)

# ---- files of features

@pytest.fixture(scope='module')
def clip(): return load_backbone('tiny-clip')

@pytest.fixture(scope='module')
def evaluated(drawn):
    churches = read_churches(drawn)
    return ChurchDataset(churches, [*churches.boxes.image.unique()], eval_transform(96))

@pytest.fixture(scope='module')
def before(clip, evaluated): return run_features(clip, evaluated)

def test_features_are_the_backbones(clip, evaluated, before):
    images = torch.stack([evaluated[i]['image'] for i in range(len(evaluated))])
    task,answers,train = held_out_task(96)
    with torch.no_grad(): close(before.features, clip(images), 1e-5); close(before.task[:20], clip(task[:20].float()/255), 1e-5)
    assert before.images==tuple(evaluated.names) and (before.answers==answers).all() and (before.train==train).all()
    assert before.features.dtype==before.task.dtype==np.float32 and before.header.task.endswith('n240-size96')

def test_features_of_plain_images_in_other_batches(clip, evaluated, before):
    plain = run_features(clip, [evaluated[i]['image'] for i in range(len(evaluated))], batch=5)
    close(plain.features, before.features, 1e-5); close(plain.task, before.task, 1e-5)
    assert plain.images==tuple(map(str, range(len(evaluated))))
    with pytest.raises(ValueError, match='not the same ones'): forgetting_scores(before, plain)

def test_training_mode_is_refused(clip, evaluated):
    twin = load_backbone('tiny-clip-random').train()
    with pytest.raises(ValueError, match='training mode'): run_features(twin, evaluated)

def test_written_and_read(before, tmp_path):
    assert save_features(tmp_path, before)==tmp_path/'features.safetensors' and save_features(tmp_path/'other.safetensors', before).is_file()
    for path in (tmp_path, tmp_path/'features.safetensors', tmp_path/'other.safetensors'):
        read = load_features(path)
        assert read.header==before.header and read.images==before.images
        for k in ('features','task','answers','train'):
            a,b = getattr(read, k),getattr(before, k)
            assert a.dtype==b.dtype and (a==b).all()
    assert sorted(p.name for p in tmp_path.iterdir())==['features.safetensors','other.safetensors']

def test_other_files_are_refused(before, tmp_path):
    with pytest.raises(FileNotFoundError, match='measure the run again'): load_features(tmp_path)
    save_file(dict(maps=torch.zeros(2)), tmp_path/'maps.safetensors')
    with pytest.raises(ValueError, match='no file of features'): load_features(tmp_path/'maps.safetensors')
    save_features(tmp_path, replace(before, header=replace(before.header, format=99)))
    with pytest.raises(ValueError, match='in format 1'): load_features(tmp_path)
    file = save_features(tmp_path, before); file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match='is damaged'): load_features(tmp_path)

def test_features_that_do_not_fit_their_names(before):
    for change in (dict(images=before.images[1:]), dict(images=before.images[:1]*len(before.images)), dict(task=before.task[:,1:]), dict(train=before.train[1:])):
        with pytest.raises(ValueError, match='no image twice'): replace(before, **change)

# ---- before and after

def made_up(seed, d=12, strength=1., n=15, m=80):
    rng = np.random.default_rng(seed); answers = np.arange(m)%2; task = rng.normal(size=(m,d)); task[:,0] += strength*(2*answers-1)
    header = FeatureHeader('made up', 'random', 96, 'a task')
    return RunFeatures(header, tuple(map(str, range(n))), rng.normal(size=(n,d)), task, answers, np.arange(m)//2%2==0)

def test_the_change_is_paired():
    a,b = made_up(0, strength=2.),made_up(1, strength=.6)
    said = lambda s: np.concatenate([forgetting.neighbor_labels(s.task[v], s.answers[v], s.task[~v], 7)==s.answers[~v] for v in (s.train,~s.train)])
    order = np.concatenate([np.flatnonzero(~v) for v in (a.train,~a.train)]); x,y,answers = said(a),said(b),a.answers[order]
    gained,lost = ([np.sum(p&~q&(answers==c)) for c in (0,1)] for p,q in ((y,x), (x,y)))
    found = forgetting_scores(a, b, k=7)
    close(found['knn_before'], x.mean()); close(found['knn'], y.mean()); close(found['knn_change'], y.mean()-x.mean())
    variance = sum(((g+l)/40-((g-l)/40)**2)/40 for g,l in zip(gained, lost))/4 # McNemar's, within each answer
    close(found['change_se'], np.sqrt(variance)); close(found['knn_se'], np.sqrt(sum((p:=y[answers==c].mean())*(1-p)/40 for c in (0,1)))/2)
    assert found['knn_change']<-.1 and found['change_se']>0
    close(forgetting_scores(b, a, k=7)['knn_change'], -found['knn_change'])

def test_the_same_encoder_has_forgotten_nothing(before):
    found = forgetting_scores(before, before)
    close(found.pop('cka'), 1)
    assert found['knn_change']==found['change_se']==0 and found['knn']==found['knn_before']

def test_features_of_another_width():
    a,b = made_up(0),made_up(1, d=31)
    close(forgetting_scores(a, b)['cka'], linear_cka(a.features, b.features))

@pytest.mark.parametrize('change,why', [(dict(task='another'), 'a task at 96 pixels before and another at 96'), (dict(size=224), 'and a task at 224')])
def test_another_task_is_refused(change, why):
    a = made_up(0)
    with pytest.raises(ValueError, match=why): forgetting_scores(a, replace(a, header=replace(a.header, **change)))

def test_a_run_that_diverged_is_refused():
    a = made_up(0)
    with pytest.raises(ValueError, match='diverged'): forgetting_scores(a, replace(a, task=a.task*np.nan))

def test_the_task_tells_trained_from_untrained(before, evaluated):
    found = forgetting_scores(before, run_features(load_backbone('tiny-clip-random'), evaluated))
    assert found['knn_before']>.8 and found['knn']<.65 and found['knn_change']<-5*found['change_se'] and found['cka']<.3

def test_real_weights_know_the_task(real):
    source = f"timm/vit_tiny_patch16_224@{real/'vit_tiny_in1k/model.safetensors'}"
    churches = read_churches(real/'photos'); names = sorted(churches.boxes.image.unique())
    photos = ChurchDataset(churches, names, eval_transform(96))
    backbone = load_backbone(source, size=96)
    found = forgetting_scores(run_features(backbone, photos), run_features(randomly_initialized(backbone), photos))
    assert found['knn_before']>.75 and found['knn']<.68 and found['knn_change']<-4*found['change_se'] and found['cka']<.5
