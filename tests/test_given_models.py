"Models as people have them: what is read as it is, and what is refused, in which words."
import importlib.util, json, os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
import peft, pytest, timm, torch, transformers as T
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from ssl_wikichurches.attention.attribution import attention_flow, gmar, gmar_weights, gradient_attention, grad_cam, rollout, token_rollout, value_norm, value_vectors
from ssl_wikichurches.attention.capture import capture_attention, maps_and_prefix, pooled_maps, read_pooled, received_maps
from ssl_wikichurches.attention.maps import compute_maps, load_maps, save_maps
from ssl_wikichurches.backbones import encoders
from ssl_wikichurches.backbones.encoders import check_encoder, load_backbone, save_backbone
from ssl_wikichurches.finetune import training
from ssl_wikichurches.finetune.attn_supervised import supervised_maps
from ssl_wikichurches.finetune.devices import Team
from ssl_wikichurches.finetune.full import FullRecipe, fit_full
from ssl_wikichurches.finetune.linear import LinearRecipe, fit_linear
from ssl_wikichurches.finetune.lora import LoraRecipe, add_adapters, fit_lora
from ssl_wikichurches.finetune.training import TrainData

SMALL = dict(depth=2, embed_dim=96, num_heads=4, img_size=64)

def images(size=96, n=2, seed=0): return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))

def timm_folder(tmp_path, arch, state=None, cfg=None, **options):
    "A folder in timm's own layout, with random weights."
    folder = tmp_path/arch; folder.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0); m = timm.create_model(arch, **SMALL|options).eval()
    save_file({k:v.contiguous() for k,v in (state(m) if state else m.state_dict()).items()}, folder/'model.safetensors')
    about = {k:v for k,v in m.pretrained_cfg.items() if isinstance(v, (int,float,str,list,tuple))}|(cfg or {})
    (folder/'config.json').write_text(json.dumps(dict(architecture=arch, model_args=SMALL|options, pretrained_cfg=about)))
    return m,folder

def hugging_folder(folder, name, **config):
    "A tiny backbone in the layout of transformers, with its config.json changed."
    load_backbone(name).model.save_pretrained(folder); p = folder/'config.json'
    p.write_text(json.dumps(json.loads(p.read_text())|config))
    return folder

def refused(folder, words):
    with pytest.raises(ValueError, match=words) as e: load_backbone(folder)
    assert '\n' not in str(e.value) and len(str(e.value))<400

# ---- what is read from an encoder has to be what its feature is made of

REFUSED = {
    'deit_tiny_distilled_patch16_224': 'made of tokens 0, 1, and a map shows the attention of token 0 alone',
    'vit_tiny_r_s16_p8_224': 'from 5 to 5 tokens, and those of 1 tokens before the patches and 8 x 8',
    'vit_small_patch16_18x2_224': '2 blocks make 4 calls', 'cait_xxs24_224': 'only a class token attends', 'xcit_nano_12_p16_224': 'only a class token attends',
    'convit_tiny': 'make 0 calls|computes attention by hand', 'samvit_base_patch16': 'no vision transformer|cannot be measured'}

@pytest.mark.parametrize('arch', REFUSED)
def test_encoders_whose_maps_would_be_of_something_else(arch, tmp_path):
    options = dict(cait_xxs24_224=dict(), convit_tiny=dict(local_up_to_layer=2)).get(arch, {})
    _,folder = timm_folder(tmp_path, arch, **options)
    refused(folder, REFUSED[arch])

spec = importlib.util.spec_from_file_location('architectures', Path(__file__).parent.parent/'benchmarks'/'architectures.py')
walk = importlib.util.module_from_spec(spec); spec.loader.exec_module(walk)

AVERAGED = {'vit_base_patch16_siglip_gap_224':{}, 'beit_base_patch16_224':{}, 'eva02_tiny_patch14_224':dict(img_size=56), 'vit_relpos_base_patch16_clsgap_224':{}, 'vit_so150m_patch16_reg4_gap_256':{},
            'naflexvit_base_patch16_par_gap':{}, 'naflexvit_so150m2_patch16_reg1_map':{}}
BROUGHT = 'vit','vit_msn','ijepa','beit','data2vec-vision','siglip2_vision_model','chinese_clip_vision_model'

@pytest.fixture(scope='module', params=[*AVERAGED, *BROUGHT])
def brought(request, tmp_path_factory):
    "Encoders that average their patches, and types of transformers that the study does not know by name; weights make attention uneven."
    name,tmp = request.param,tmp_path_factory.mktemp('m')
    if name in AVERAGED: return load_backbone(timm_folder(tmp, name, lambda m: walk.uneven(m).state_dict(), **AVERAGED[name])[1])
    torch.manual_seed(0); walk.transformers_folder(tmp, name)
    return load_backbone(tmp)

def test_maps_of_brought_encoders_are_of_their_own_attention(brought):
    x = images(brought.spec.size); maps,prefix = maps_and_prefix(brought, x)
    torch.testing.assert_close(maps.flatten(-2), walk.unfused_rows(brought, x), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.sum((-2,-1))+prefix.sum(-1), torch.ones(maps.shape[:3]))
    assert brought.spec.pooling=='head' or maps.shape[1]==brought.depth
    if brought.spec.pooling=='mean':
        assert torch.equal(maps, received_maps(brought, x)) and compute_maps(brought, ['a','b'], x).header.rows=='received'
        with capture_attention(full=True) as seen: brought(x)
        torch.testing.assert_close(read_pooled(brought, seen.records), maps, atol=1e-6, rtol=0)
        with torch.no_grad(), capture_attention() as seen: brought(x)
        with pytest.raises(ValueError, match='query 0 alone was captured'): read_pooled(brought, seen.records)

def test_features_of_brought_encoders_and_their_attribution(brought, tmp_path):
    x,t = images(brought.spec.size),torch.tensor([0,1]); classifier = torch.nn.Linear(brought.dim, 4); n = brought.spec.n_prefix
    with torch.no_grad(): again,f = load_backbone(save_backbone(brought, tmp_path/'b')),brought(x)
    with torch.no_grad(): assert torch.equal(again(x), f) and again.spec==brought.spec
    if brought.spec.family in ('ijepa','vit','msn'):
        with torch.no_grad(): tokens = brought.model(**brought._inputs(x)).last_hidden_state
        assert torch.equal(f, tokens.mean(1) if brought.spec.family=='ijepa' else tokens[:,0])
    if brought.spec.pooling=='mean': # rollout by hand: half attention, half itself, and the mean over patches
        with torch.no_grad(), capture_attention(full=True) as seen: brought(x)
        rolled = torch.eye(n+brought.spec.grid**2)
        for r in seen.records: rolled = (r.weights.mean(1)+torch.eye(rolled.shape[-1]))/2@rolled
        torch.testing.assert_close(token_rollout(brought, x), rolled[:,n:].mean(1), atol=1e-6, rtol=0)
        flow = attention_flow(brought, x); assert (flow>0).all() and (flow<=1).all()
    for m in (gradient_attention(brought, classifier, x, t), grad_cam(brought, classifier, x, t), rollout(brought, x)): assert m.isfinite().all() and m.std()>0
    if brought.spec.family=='beit' and brought.model.config.model_type=='data2vec-vision':
        with pytest.raises(ValueError, match='takes more than its output'): value_vectors(brought, x)
        return
    vectors,constants = value_vectors(brought, x); assert vectors.isfinite().all() and vectors.shape[2]==n+brought.spec.grid**2

def test_a_model_for_images_of_any_shape_sees_squares(tmp_path):
    "At the size that its options ask for, and at another one; as patches of a list of which none is masked."
    from timm.models.naflexvit import batch_patchify
    m,folder = timm_folder(tmp_path, 'naflexvit_base_patch16_gap'); b = load_backbone(folder); m.reset_classifier(0)
    assert (b.spec.size,b.spec.grid,b.spec.pooling)==(64,4,'mean')
    with torch.no_grad():
        for size in (64,96):
            b = load_backbone(folder, size=size); x = images(size); own = (x-b.mean)/b.std
            coord = torch.cartesian_prod(*[torch.arange(size//16)]*2).expand(2,-1,-1)
            listed = m(batch_patchify(own, (16,16))[0], patch_coord=coord, patch_valid=torch.ones(coord.shape[:2], dtype=bool))
            assert torch.equal(b(x), m(own)) and b.spec.grid==size//16; torch.testing.assert_close(b(x), listed, atol=1e-5, rtol=0)
            assert torch.equal(b.patches(x), m.forward_features(own)[:,b.spec.n_prefix:])
            again = load_backbone(save_backbone(b, tmp_path/f's{size}')); assert torch.equal(again(x), b(x)) and again.spec==b.spec

def test_a_head_with_several_latents(tmp_path):
    "The first counts, or the mean, after what the head does with them."
    from timm.layers import AttentionPoolLatent
    m,folder = timm_folder(tmp_path, 'vit_base_patch16_siglip_224'); b = load_backbone(folder); x = images(64)
    for pool in ('token','avg'):
        torch.manual_seed(0); b.model.attn_pool = AttentionPoolLatent(96, num_heads=4, latent_len=3, pool_type=pool).eval()
        rows = walk.unfused_rows(b, x) if pool=='token' else None
        with torch.no_grad(), capture_attention(full=True) as seen: b(x)
        own = seen.records[-1].weights; own = own[:,:,0] if pool=='token' else own.mean(2)
        torch.testing.assert_close(pooled_maps(b, x)[:,0].flatten(-2), own, atol=1e-6, rtol=0)
        if rows is not None: torch.testing.assert_close(own, rows[:,0], atol=1e-6, rtol=0)

def test_pixels_that_no_patch_sees(tmp_path):
    config = T.SiglipVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=52, patch_size=14)
    T.SiglipVisionModel(config).save_pretrained(tmp_path)
    refused(tmp_path, 'patches of 14 pixels do not fill an image of 52: load it with `size=42`')
    b = load_backbone(tmp_path, size=42); x = images(42); y = x.clone(); y[...,-1,-1] = 0
    assert b.spec.grid==3 and not torch.equal(pooled_maps(b, x), pooled_maps(b, y)) # the last pixel counts

@pytest.mark.parametrize('options', (dict(img_size=(64,96)), dict(patch_size=(16,8))))
def test_images_and_patches_are_square(options, tmp_path):
    refused(timm_folder(tmp_path, 'vit_tiny_patch16_224', **options)[1], 'maps are read from square')
    config = T.Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=16, image_size=(64,96))
    T.Dinov2Model(config).save_pretrained(tmp_path/'d')
    refused(tmp_path/'d', r'images of \[64, 96\] pixels: maps are read from square')

def test_patches_that_overlap_or_stand_in_columns():
    b = load_backbone('tiny-clip'); embed = b.model.embeddings.patch_embedding
    with torch.no_grad(): embed.weight[:,:,0] = 0 # a row of pixels that no patch sees
    with pytest.raises(ValueError, match='not cut from the image as squares of 8'): check_encoder(b)
    b = load_backbone('tiny-clip'); inner = b.model.embeddings.patch_embedding.forward
    b.model.embeddings.patch_embedding.forward = lambda x: inner(x).transpose(2,3)
    with pytest.raises(ValueError, match='row by row'): check_encoder(b)

def test_weights_that_are_no_numbers(tmp_path):
    b = load_backbone('tiny-mae')
    for value in (float('nan'), float('inf')):
        with torch.no_grad(): b.model.layers[2].mlp.fc1.weight[3,4] = value
        refused(save_backbone(b, tmp_path), 'its layers.2.mlp.fc1.weight holds values that are no numbers, or infinite')

def test_the_check_leaves_the_model_as_it_was():
    b = load_backbone('tiny-dinov3'); x = images(); before = {k:v.clone() for k,v in b.state_dict().items()}
    with torch.no_grad(): plain = b(x)
    torch.manual_seed(5); state = torch.get_rng_state(); check_encoder(b)
    assert torch.equal(torch.get_rng_state(), state) and all(torch.equal(v, before[k]) for k,v in b.state_dict().items())
    assert all(p.grad is None for p in b.parameters()) and not any('forward' in vars(m) for m in b.modules())
    with torch.no_grad(): assert torch.equal(b(x), plain)
    with torch.inference_mode(): inside = load_backbone('tiny-dinov3')
    assert not next(inside.parameters()).is_inference()

# ---- heads of another build than the blocks

@pytest.fixture(scope='module')
def registers_and_head(tmp_path_factory):
    "Four registers, and a pooling head that attends to patches alone; weights make attention uneven."
    def sharp(m):
        with torch.no_grad():
            for k,p in m.named_parameters():
                if 'attn' in k and p.ndim>1: p.mul_(6)
        return m.state_dict()
    m,folder = timm_folder(tmp_path_factory.mktemp('m'), 'vit_so150m_patch16_reg4_map_256', sharp)
    return m,load_backbone(folder)

def test_a_head_that_attends_to_patches_alone(registers_and_head):
    m,b = registers_and_head; x = images(64)
    with torch.no_grad(): own = m.forward_head(m.forward_features((x-b.mean)/b.std), pre_logits=True)
    with torch.no_grad(): torch.testing.assert_close(b(x), own)
    maps,prefix = maps_and_prefix(b, x)
    assert maps.shape==(2,1,4,4,4) and (prefix==0).all() and prefix.shape[-1]==4
    torch.testing.assert_close(maps.sum((-2,-1)), torch.ones(2,1,4)) # nothing went elsewhere
    with torch.no_grad(): # by hand, from what the head was given
        tokens = m.forward_features((x-b.mean)/b.std)[:,4:]; head = m.attn_pool
        q = head.q(head.latent.expand(2,-1,-1)).unflatten(-1, (4,-1)).transpose(1,2); k = head.kv(tokens).unflatten(-1, (2,4,-1)).permute(2,0,3,1,4)[0]
        row = (head.q_norm(q)@head.k_norm(k).transpose(-2,-1)*head.scale).softmax(-1)[:,:,0]
    torch.testing.assert_close(maps[:,0].flatten(-2), row, atol=1e-6, rtol=1e-5)
    assert maps.flatten(-2).amax(-1).max()>1.5/16 # and it is uneven

def test_attribution_through_such_a_head(registers_and_head, tmp_path):
    _,b = registers_and_head; x,t = images(64),torch.tensor([0,1]); classifier = torch.nn.Linear(b.dim, 4)
    assert token_rollout(b, x).shape==(2,20) and (token_rollout(b, x).sum(-1)-1).abs().max()<1e-5
    for m in (rollout(b, x), gmar(b, classifier, x, t), gradient_attention(b, classifier, x, t), grad_cam(b, classifier, x, t), attention_flow(b, x), value_norm(b, x)[:,0]):
        assert m.shape==(2,4,4) and m.isfinite().all() and m.std()>0
    stored = compute_maps(b, ['a','b'], x)
    again = load_maps(save_maps(tmp_path/'maps.safetensors', stored))
    assert torch.equal(again.maps, stored.maps.float()) and again.received.shape==(2,2,4,4,4)

def test_a_head_with_other_heads_than_the_blocks(tmp_path):
    _,folder = timm_folder(tmp_path, 'vit_pe_core_base_patch16_224', num_heads=12); b = load_backbone(folder); x = images(64)
    assert pooled_maps(b, x).shape==(2,1,8,4,4) and received_maps(b, x).shape==(2,2,12,4,4)
    assert load_maps(save_maps(tmp_path/'maps.safetensors', compute_maps(b, ['a','b'], x))).received.shape[2]==12
    classifier,t = torch.nn.Linear(b.dim, 4),torch.tensor([0,1])
    with pytest.raises(ValueError, match='has 8 heads, its blocks have 12'): gmar_weights(b, classifier, x, t)
    assert gmar(b, classifier, x, t).isfinite().all()

def test_blocks_whose_attention_stands_beside_the_mlp(tmp_path):
    m,folder = timm_folder(tmp_path, 'vit_base_patch16_xp_224'); b = load_backbone(folder)
    assert b.n_heads==4 and pooled_maps(b, images(64)).shape==(2,2,4,4,4)

# ---- dropout that is on

def put_adapters(how):
    b = load_backbone('tiny-clip')
    if how=='add_adapters': add_adapters(b, LoraRecipe(dropout=.5))
    else: b.model = peft.get_peft_model(b.model, peft.LoraConfig(target_modules=['q_proj','v_proj'], lora_dropout=.5))
    with torch.no_grad():
        for n,p in b.named_parameters():
            if 'lora_B' in n: p.normal_(std=.3, generator=torch.Generator().manual_seed(0))
    return b

def test_adapters_do_not_drop_out_unasked():
    b = put_adapters('add_adapters')
    assert torch.equal(pooled_maps(b, images()), pooled_maps(b, images()))
    b = put_adapters('get_peft_model')
    with pytest.raises(ValueError, match='training mode in its model'): pooled_maps(b, images())
    assert torch.equal(pooled_maps(b.eval(), images()), pooled_maps(b, images()))
    b.model.train()
    for f in (pooled_maps, received_maps, rollout):
        with pytest.raises(ValueError, match='call `backbone.eval\\(\\)`'): f(b, images())
    assert add_adapters(load_backbone('tiny-clip').train(), LoraRecipe()) # a model in training stays there

# ---- adapters beside a model, and trainings that train nothing

def test_adapters_in_a_folder_are_not_applied_unsaid(tmp_path):
    folder = hugging_folder(tmp_path/'m', 'tiny-clip')
    peft.get_peft_model(load_backbone('tiny-clip').model, peft.LoraConfig(target_modules=['q_proj'], init_lora_weights=False)).save_pretrained(folder)
    refused(folder, 'holds a model and adapters of peft.*merge_and_unload')
    timm_folder(tmp_path, 'vit_tiny_patch16_224'); (tmp_path/'vit_tiny_patch16_224'/'adapter_config.json').write_text('{}')
    refused(tmp_path/'vit_tiny_patch16_224', 'holds a model and adapters of peft')
    (folder/'config.json').unlink(); refused(folder, 'does not say of which backbone')
    save_backbone(load_backbone('tiny-clip'), folder/'base'); merged = load_backbone(folder)
    assert all(p.requires_grad for p in merged.parameters()) and not hasattr(merged.model, 'peft_config')
    assert not torch.equal(pooled_maps(merged, images()), pooled_maps(load_backbone('tiny-clip'), images()))

def test_full_fine_tuning_of_a_frozen_backbone_is_refused(data):
    with pytest.raises(ValueError, match='no weight of tiny-clip can be trained'): fit_full(load_backbone('tiny-clip').requires_grad_(False), data, FullRecipe(epochs=1))

# ---- preprocessing

PROCESSOR = dict(image_mean=[.1,.2,.3], image_std=[.4,.5,.6], do_center_crop=True, crop_size=dict(height=64, width=64), size=dict(shortest_edge=72))

@pytest.mark.parametrize('change,size,mean,std', (
    ({}, 64, (.1,.2,.3), (.4,.5,.6)),
    (dict(do_normalize=False), 64, (0,0,0), (1,1,1)),
    (dict(do_center_crop=False), 72, (.1,.2,.3), (.4,.5,.6)),
    (dict(do_center_crop=False, do_resize=False), 96, (.1,.2,.3), (.4,.5,.6)), # of config.json
    (dict(do_center_crop=False, size=dict(longest_edge=80)), 96, (.1,.2,.3), (.4,.5,.6)),
    (dict(rescale_factor=1/127.5), 64, (.05,.1,.15), (.2,.25,.3)))) # a white pixel is 2
def test_what_a_processor_says_that_it_does(change, size, mean, std, tmp_path):
    hugging_folder(tmp_path, 'tiny-clip')
    for name,text in (('processor_config.json', dict(image_processor=PROCESSOR|change)), ('preprocessor_config.json', PROCESSOR|change)):
        (tmp_path/name).write_text(json.dumps(text)); spec = load_backbone(tmp_path).spec; (tmp_path/name).unlink()
        assert spec.size==size and spec.mean==pytest.approx(mean) and spec.std==pytest.approx(std)

def test_the_newer_file_of_a_processor_counts(tmp_path):
    hugging_folder(tmp_path, 'tiny-clip'); old = dict(PROCESSOR, image_mean=[.9]*3)
    (tmp_path/'preprocessor_config.json').write_text(json.dumps(old)); (tmp_path/'processor_config.json').write_text(json.dumps(dict(image_processor=PROCESSOR)))
    assert load_backbone(tmp_path).spec.mean==(.1,.2,.3)
    (tmp_path/'processor_config.json').write_text(json.dumps(dict(processor_class='CLIPProcessor'))) # of before: nothing about images
    assert load_backbone(tmp_path).spec.mean==(.9,.9,.9)
    for change,words in ((dict(do_rescale=False), 'takes pixels as they come'), (dict(crop_size=dict(height=64, width=32)), 'maps are read from square')):
        (tmp_path/'processor_config.json').write_text(json.dumps(dict(image_processor=PROCESSOR|change))); refused(tmp_path, words)

@pytest.mark.parametrize('name', ('tiny-dinov2','tiny-mae','tiny-siglip'))
@pytest.mark.parametrize('change', (dict(return_dict=False), dict(output_hidden_states=True), dict(output_attentions=True)))
def test_configurations_that_change_what_a_forward_pass_returns(name, change, tmp_path):
    b = load_backbone(hugging_folder(tmp_path, name, **change)); own = load_backbone(name)
    with torch.no_grad(): assert torch.equal(b(images()), own(images())) and torch.equal(b.blocks(images()), own.blocks(images()))
    saved = save_backbone(b, tmp_path/'saved'); about = json.loads((saved/'backbone.json').read_text())
    about['architecture']['config'] |= change; (saved/'backbone.json').write_text(json.dumps(about))
    with torch.no_grad(): assert torch.equal(load_backbone(saved)(images()), own(images()))

# ---- half precision

class Queries(TorchFunctionMode):
    "Queries and keys of every fused call, and projections of every other."
    def __init__(self): super().__init__(); self.qk = []
    def __torch_function__(self, f, types, args=(), kwargs=None):
        if f is F.scaled_dot_product_attention: self.qk.append(args[:2])
        return f(*args, **(kwargs or {}))

@pytest.mark.parametrize('name', ('tiny-clip','tiny-dinov2','tiny-supervised'))
def test_weights_under_autocast_are_those_of_the_kernel(name):
    b = load_backbone(name); x,n = images(),b.spec.n_prefix
    with torch.no_grad():
        with torch.autocast('cpu', torch.bfloat16):
            maps,sup,rolled = pooled_maps(b, x),supervised_maps(b, x, [-1]),rollout(b, x)
            with Queries() as g: b(x)
        rows = [(q.double()@k.double().transpose(-1,-2)*q.shape[-1]**-.5).softmax(-1) for q,k in g.qk]
        assert g.qk[-1][0].dtype==torch.bfloat16
    for got in (maps[:,-1],sup[:,0]): assert ((got.flatten(-2)-rows[-1][:,:,0,n:])/rows[-1][:,:,0,n:]).abs().max()<1e-4
    r = torch.eye(rows[0].shape[-1]).double()
    for a in rows: a = a.mean(1)+torch.eye(a.shape[-1]); r = (a/a.sum(-1, keepdim=True))@r
    assert ((rolled.flatten(1)-r[:,0,n:])/r[:,0,n:]).abs().max()<1e-4

def test_weights_of_a_pooling_head_under_autocast():
    "nn.MultiheadAttention: its queries and keys as it projects them, in bfloat16, and then exactly."
    b = load_backbone('tiny-siglip'); x = images(); head = b.model.head; given = []
    hook = head.attention.register_forward_pre_hook(lambda m,args,kwargs: given.append(args), with_kwargs=True)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): maps = pooled_maps(b, x)
    hook.remove(); m = head.attention; query,key = given[0][:2]
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): # sequence first, keys and values at once, as the module does
        q = F.linear(query.transpose(0,1), m.in_proj_weight[:96], m.in_proj_bias[:96]); kv = F.linear(key.transpose(0,1), m.in_proj_weight[96:], m.in_proj_bias[96:])
        q,k = (t.unflatten(-1, (4,-1)).permute(1,2,0,3) for t in (q, kv[...,:96]))
    assert q.dtype==torch.bfloat16
    row = (q.double()@k.double().transpose(-1,-2)*q.shape[-1]**-.5).softmax(-1)[:,:,0]
    assert ((maps[:,0].flatten(-2)-row)/row).abs().max()<1e-4

def test_rounding_that_loses_an_encoder(tmp_path):
    b = load_backbone('tiny-clip')
    with torch.no_grad(): b.model.encoder.layers[0].mlp.fc1.weight[0,0] = 1e5
    with pytest.raises(ValueError, match='cannot be rounded to torch.float16: encoder.layers.0.mlp.fc1.weight would be infinite'):
        save_backbone(b, tmp_path/'a', torch.float16)
    assert not (tmp_path/'a'/'backbone.json').exists()
    assert load_backbone(save_backbone(b, tmp_path/'b', torch.bfloat16)).dim==96
    b = load_backbone('tiny-supervised'); b.model.norm.eps = 0.
    with torch.no_grad(): # tokens that differ by what half precision cannot hold
        for p in b.model.blocks.parameters(): p.zero_()
        for p in (b.model.cls_token, b.model.pos_embed): p.mul_(1e-9)
    with torch.no_grad(): assert b(images()).isfinite().all()
    with pytest.raises(ValueError, match='features would be no numbers'): save_backbone(b, tmp_path/'c', torch.float16)

# ---- going on with a training

@contextmanager
def stopped_after(steps):
    real,left = training._gradients,iter(range(steps))
    def gradients(*args):
        if next(left, None) is None: raise InterruptedError
        return real(*args)
    training._gradients = gradients
    try: yield
    except InterruptedError: pass
    finally: training._gradients = real

@pytest.mark.parametrize('fit,recipe', ((fit_full, FullRecipe(epochs=3, batch=20)), (fit_lora, LoraRecipe(epochs=3, batch=20)), (fit_linear, LinearRecipe(epochs=3, batch=20))))
def test_a_checkpoint_belongs_to_its_encoder(fit, recipe, two_dozen, tmp_path):
    "Two encoders of one shape: what one began is not what the other goes on with."
    steps = -(-len(two_dozen.split.train)//20)
    with stopped_after(2*steps): fit(load_backbone('tiny-siglip'), two_dozen, recipe, 0, 'cpu', tmp_path)
    with pytest.raises(ValueError, match='differs in the encoder that it started from'):
        fit(load_backbone('tiny-siglip2'), two_dozen, recipe, 0, 'cpu', tmp_path)
    with pytest.raises(ValueError, match='differs in recipe'): fit(load_backbone('tiny-siglip'), two_dozen, replace(recipe, epochs=4), 0, 'cpu', tmp_path)
    with pytest.raises(ValueError, match=r'differs in seed \(0 there, 1 here\)'): fit(load_backbone('tiny-siglip'), two_dozen, recipe, 1, 'cpu', tmp_path)
    again = fit(load_backbone('tiny-siglip'), two_dozen, recipe, 0, 'cpu', tmp_path); whole = fit(load_backbone('tiny-siglip'), two_dozen, recipe, 0)
    assert all(torch.equal(v, whole.state[k]) for k,v in again.state.items())

def test_another_number_of_processes_is_said(tmp_path):
    from ssl_wikichurches.finetune.checkpoint import Checkpoint
    layer = torch.nn.Linear(2, 2); optimizer,order = torch.optim.AdamW(layer.parameters()),torch.Generator()
    key = dict(recipe='a', seed=0)|{'number of processes': 2}; path = tmp_path/'checkpoint.safetensors'
    Checkpoint(path, key).save(layer, optimizer, order, {}, {})
    with pytest.raises(ValueError, match=r'differs in number of processes \(2 there, 1 here\). Go on as it was begun'):
        Checkpoint(path, key|{'number of processes': 1}).load(layer, optimizer, order)
    from ssl_wikichurches.data.files import read_tensors, write_tensors
    tensors,texts = read_tensors(path); write_tensors(path, tensors, texts|dict(key='0'*64))
    with pytest.raises(ValueError, match='another training, which differs in how they are written down'): Checkpoint(path, key).load(layer, optimizer, order)

def test_a_team_that_nobody_started(monkeypatch):
    for name in ('WIKICHURCHES_TEAM','TORCHELASTIC_RUN_ID','SLURM_STEP_NUM_TASKS'): monkeypatch.delenv(name, raising=False)
    for said,words in (('2','was started alone, and would wait'), ('two',"WORLD_SIZE is 'two'"), ('0',"WORLD_SIZE is '0'")):
        monkeypatch.setenv('WORLD_SIZE', said)
        with pytest.raises(ValueError, match=words): Team()
    for said in ('','1'):
        monkeypatch.setenv('WORLD_SIZE', said); assert Team().n==1

# ---- checkpoints of timm

def test_weights_of_another_activation(tmp_path):
    m = timm.create_model('vit_base_patch16_clip_quickgelu_224', num_classes=0, depth=1)
    save_file(m.state_dict(), tmp_path/'w.safetensors')
    with pytest.raises(ValueError, match='Load vit_base_patch16_clip_quickgelu_224.openai'): load_backbone(f"timm/vit_base_patch16_clip_224.openai@{tmp_path/'w.safetensors'}")
    refused(timm_folder(tmp_path, 'vit_base_patch16_clip_224', cfg=dict(tag='openai'))[1], 'natively QuickGELU')
    assert load_backbone(timm_folder(tmp_path, 'vit_base_patch16_clip_quickgelu_224', cfg=dict(tag='openai'))[1]).depth==2

def official(m):
    "The layout of the published DINOv2 with registers: the class token's position stands with the others."
    pos,out = torch.randn(1,1,96)*.02,dict(mask_token=torch.zeros(1,96))
    for k,v in m.state_dict().items():
        if k=='reg_token': out['register_tokens'] = v
        elif k=='pos_embed': out[k] = torch.cat([pos, v], 1)
        else: out[k] = v-pos if k=='cls_token' else v
    return out

def test_layouts_that_timm_knows(tmp_path):
    m,folder = timm_folder(tmp_path, 'vit_small_patch14_reg4_dinov2', official, img_size=56); b = load_backbone(folder); x = images(56)
    with torch.no_grad(): torch.testing.assert_close(b(x), m.forward_features((x-b.mean)/b.std)[:,0], atol=1e-5, rtol=1e-5)
    about = json.loads((folder/'config.json').read_text()); about['model_args']['img_size'] = 70
    (folder/'config.json').write_text(json.dumps(about))
    refused(folder, r'pos_embed is \(1, 17, 96\) there but \(1, 25, 96\) in the model') # timm would have resampled them

def test_timm_models_that_transformers_saved(tmp_path):
    config = T.TimmWrapperConfig.from_dict(dict(architecture='vit_tiny_patch16_224', num_classes=0, model_args=SMALL, pretrained_cfg=dict(mean=[.1]*3, std=[.2]*3)))
    model = T.TimmWrapperModel(config).eval(); model.save_pretrained(tmp_path); b = load_backbone(tmp_path); x = images(64)
    with torch.no_grad(): assert b.spec.mean==(.1,)*3 and torch.equal(b(x), model.timm_model.forward_features((x-.1)/.2)[:,0])

# ---- files that are none

POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:0123456789\nsize 123456\n'

@pytest.mark.parametrize('layout', ('saved','timm','transformers','pickled'))
@pytest.mark.parametrize('content,words', ((POINTER, 'git lfs pull'), (b'<!DOCTYPE html><html><body>Not found</body></html>', 'is a web page'),
                                           (b'', 'is empty'), (b'\x00\x01\x02'*40, 'damaged or incomplete')))
def test_files_that_are_no_weights(layout, content, words, tmp_path):
    if layout=='saved': folder = save_backbone(load_backbone('tiny-clip'), tmp_path/'m')
    elif layout=='timm': folder = timm_folder(tmp_path, 'vit_tiny_patch16_224')[1]
    elif layout=='transformers': folder = hugging_folder(tmp_path/'m', 'tiny-clip')
    else: folder = timm_folder(tmp_path, 'vit_tiny_patch16_224')[1]; (folder/'model.safetensors').rename(folder/'pytorch_model.bin')
    file = next(p for p in folder.iterdir() if p.suffix in ('.safetensors','.bin')); file.write_bytes(content)
    refused(folder, f'{file.name} .*{words}')

def test_pickles_are_opened_as_weights_only(tmp_path):
    _,folder = timm_folder(tmp_path, 'vit_tiny_patch16_224'); state = load_file(folder/'model.safetensors'); (folder/'model.safetensors').unlink()
    torch.save(dict(model=state), folder/'pytorch_model.bin'); assert load_backbone(folder).depth==2
    torch.save(dict(model=state, args=FullRecipe()), folder/'pytorch_model.bin')
    with pytest.raises(ValueError, match='holds more than tensors.*safetensors') as e: load_backbone(folder)
    assert 'weights_only' not in str(e.value)

@pytest.mark.parametrize('layout,name', (('saved','backbone.json'), ('transformers','config.json'), ('transformers','preprocessor_config.json'), ('timm','config.json')))
def test_configurations_that_were_cut_off(layout, name, tmp_path):
    folder = dict(saved=lambda: save_backbone(load_backbone('tiny-clip'), tmp_path/'m'), timm=lambda: timm_folder(tmp_path, 'vit_tiny_patch16_224')[1],
                  transformers=lambda: hugging_folder(tmp_path/'m', 'tiny-clip'))[layout]()
    (folder/name).write_text('{"image_mean": [.1'); refused(folder, f'{name} is damaged or incomplete')
    (folder/name).write_bytes(POINTER); refused(folder, f'{name} is a pointer of Git LFS')

# ---- gradients through blocks that are computed twice

@pytest.mark.parametrize('name', ('tiny-clip','tiny-supervised'))
def test_gradient_checkpointing_and_capture(name):
    b,x = load_backbone(name),images()
    def on(v):
        if b.spec.family=='timm': b.model.set_grad_checkpointing(v)
        else: getattr(b.model, f"gradient_checkpointing_{'enable' if v else 'disable'}")()
    maps = pooled_maps(b, x); on(True)
    assert torch.equal(pooled_maps(b, x), maps) # without gradients nothing is computed twice
    with pytest.raises(ValueError, match='turn gradient checkpointing off'): supervised_maps(b.train(), x, [-1])
    on(False); supervised_maps(b.train(), x, [-1]).square().sum().backward()
    classifier = torch.nn.Linear(96, 4); b.eval(); on(True)
    for f in (gradient_attention, grad_cam):
        if name=='tiny-supervised':
            with pytest.raises(ValueError, match='turn gradient checkpointing off'): f(b, classifier, x, torch.tensor([0,1]))
        else: assert f(b, classifier, x, torch.tensor([0,1])).isfinite().all() # which transformers does in training alone

def test_slow_attention_is_named_for_every_family():
    for name in ('tiny-clip','tiny-siglip'):
        b = load_backbone(name); b.model.set_attn_implementation('eager')
        with pytest.raises(RuntimeError, match=r"computes attention by hand.*set_attn_implementation\('sdpa'\)"): pooled_maps(b, images())

def test_the_command_that_checks_a_model(capsys, tmp_path):
    from ssl_wikichurches.cli import wikichurches_study
    wikichurches_study(check_model='tiny-siglip')
    assert 'can be measured: 12 x 12 patches of 8 pixels behind no other tokens, 4 blocks of 4 heads' in capsys.readouterr().out
    _,folder = timm_folder(tmp_path, 'deit_tiny_distilled_patch16_224')
    with pytest.raises(SystemExit, match='wikichurches_study: deit.* cannot be measured: its feature is made of tokens 0, 1'): wikichurches_study(check_model=str(folder))
