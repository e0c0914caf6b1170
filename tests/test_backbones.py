"Every way a backbone can be loaded, saved and refused."
import json, os, socket, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pytest, timm, torch
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, CLIPConfig, CLIPModel, Dinov2WithRegistersForImageClassification, SiglipConfig, SiglipModel,
                          ViTMAEForPreTraining)
from ssl_wikichurches.backbones import encoders as backbones
from ssl_wikichurches.backbones.encoders import attention_projections, load_backbone, save_backbone
from ssl_wikichurches.backbones.registry import BACKBONES, FAMILIES, HALF, IMAGENET, OPENAI, TINY, WEIGHTS

HUGGING = [k for k in TINY if k!='tiny-supervised']

def images(size=96, n=2, seed=0): return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def run(backbone, x): return backbone(x)

def layout(folder, backbone):
    backbone.model.save_pretrained(folder)
    return str(folder)

# ---- features

@pytest.mark.parametrize('name', TINY)
def test_features_of_the_blocks_are_what_the_blocks_return(name):
    backbone,returned = load_backbone(name),[]
    blocks = next(m for k,m in backbone.model.named_modules() if k.rpartition('.')[2] in ('layer','layers','blocks'))
    hooks = [b.register_forward_hook(lambda module, args, out: returned.append(out[0] if isinstance(out, tuple) else out)) for b in blocks]
    with torch.no_grad(): backbone(images())
    for h in hooks: h.remove()
    with torch.no_grad(): found = backbone.blocks(images())
    assert torch.equal(found, torch.stack(returned, 1)[:,:,backbone.spec.n_prefix:])

# ---- geometry and the registry

@pytest.mark.parametrize('name', TINY)
def test_tokens_are_where_the_record_says(name):
    b = load_backbone(name)
    s = b.spec
    if s.family=='timm': tokens = b.model.forward_features(images()).shape[1]
    else:
        more = dict(noise=torch.arange(144.).expand(2,-1)) if s.family=='mae' else {}
        tokens = b.model(images(), **more).last_hidden_state.shape[1]
    assert tokens==s.n_prefix+s.grid**2
    assert (b.dim, b.depth, b.n_heads, s.grid)==(96, 4, 4, 12)
    assert BACKBONES[name.removeprefix('tiny-')].n_prefix==s.n_prefix

@pytest.mark.parametrize('name', TINY)
def test_patch_order_is_reading_order(name):
    "What a patch embeds depends on its own pixels: a change at the bottom right moves the last patch token most, in the first block's input."
    b = load_backbone(name)
    embed = next(m for n,m in b.model.named_modules() if isinstance(m, torch.nn.Conv2d))
    seen = []
    hook = embed.register_forward_hook(lambda m,i,o: seen.append(o.flatten(2)))
    x = images(n=1).repeat(2,1,1,1); x[1,:,-8:,-8:] = 0
    run(b, x); hook.remove()
    changed = (seen[0][0]-seen[0][1]).abs().sum(0)
    assert changed.argmax()==143 and (changed>0).sum()==1

@pytest.mark.parametrize('name', TINY)
def test_pooled_feature_is_the_family_s_own(name):
    b = load_backbone(name); x = (images()-b.mean)/b.std
    with torch.no_grad():
        if b.spec.family=='timm': own = b.model.forward_features(x)[:,0] # its last step is the norm
        elif b.spec.family=='mae': own = b.model(x, noise=torch.arange(144.).expand(2,-1)).last_hidden_state[:,0]
        elif b.spec.family=='clip': own = b.model.post_layernorm(b.model(x).last_hidden_state[:,0])
        elif b.spec.family=='siglip': own = b.model.head(b.model(x).last_hidden_state)
        else: own = b.model(x).last_hidden_state[:,0]
    assert torch.equal(run(b, images()), own)

def test_projections_of_vit_b_size():
    for family in ('dinov2', 'dinov3', 'mae', 'clip', 'siglip'):
        config = AutoConfig.for_model(FAMILIES[family].types[0], **dict(num_register_tokens=4) if family.startswith('dino') else {})
        with torch.device('meta'): model = backbones.build_architecture(backbones.transformers_architecture(config))
        b = backbones.Backbone(replace(BACKBONES[family], size=224), model, {})
        assert (b.depth, b.n_heads, b.dim)==(12, 12, 768) or family=='dinov3'
        names = [n for block in attention_projections(b) for k,n in block.items() if k in 'qv']
        assert len(names)==len(set(names))==2*b.depth
        assert not any('head' in n for n in names)

def test_projections_refuse_biases_that_adapters_miss():
    model = timm.create_model('eva02_tiny_patch14_224', num_classes=0, global_pool='token', depth=2, qkv_fused=True)
    spec = replace(BACKBONES['supervised'], name='eva', patch=14)
    with pytest.raises(ValueError, match='cannot follow'): attention_projections(backbones.Backbone(spec, model, {}))

# ---- determinism

@pytest.mark.parametrize('name', TINY)
def test_same_name_same_weights_and_global_random_state_untouched(name):
    torch.manual_seed(7); before = torch.get_rng_state()
    a = load_backbone(name).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    b = load_backbone(name).state_dict()
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_siglip2_is_not_siglip():
    assert not torch.equal(run(load_backbone('tiny-siglip'), images()), run(load_backbone('tiny-siglip2'), images()))

@pytest.mark.parametrize('name', TINY)
def test_permuted_batch_gives_permuted_features(name):
    b = load_backbone(name); x = images(n=3)
    torch.testing.assert_close(run(b, x)[[2,0,1]], run(b, x[[2,0,1]]), atol=1e-5, rtol=0)

# ---- input sizes

@pytest.mark.parametrize('name', TINY)
@pytest.mark.parametrize('size', (64, 128))
def test_other_input_size(name, size):
    b = load_backbone(name, size=size)
    assert b.spec.size==size and b.spec.grid==size//8
    assert torch.isfinite(run(b, images(size))).all()
    with pytest.raises(ValueError, match=f'{size}, {size}'): b(images(96))

@pytest.mark.parametrize('x', (torch.zeros(3,96,96), torch.zeros(1,1,96,96), torch.zeros(1,3,96,96,dtype=torch.uint8), torch.zeros(1,3,96,88)))
def test_wrong_images_are_refused(x):
    with pytest.raises(ValueError, match='takes float images of shape'): load_backbone('tiny-clip')(x)

# ---- saving

@pytest.mark.parametrize('name', TINY)
@pytest.mark.parametrize('size', (None, 64))
def test_saved_backbone_comes_back_bit_for_bit(name, size, tmp_path):
    b = load_backbone(name, size=size)
    with torch.no_grad(): next(p for p in b.parameters()).add_(.1) # as if fine-tuned
    x = images(b.spec.size)
    again = load_backbone(save_backbone(b, tmp_path/'a'/'b'))
    assert again.spec==b.spec and torch.equal(run(again, x), run(b, x)) and not again.training
    assert sorted(p.name for p in (tmp_path/'a'/'b').iterdir())==['backbone.json', 'backbone.safetensors']
    third = load_backbone(save_backbone(again, tmp_path/'c')) # a saved one can be saved
    assert torch.equal(run(third, x), run(b, x))

def test_saving_over_another_replaces_it(tmp_path):
    save_backbone(load_backbone('tiny-clip'), tmp_path); save_backbone(load_backbone('tiny-mae'), tmp_path)
    assert load_backbone(tmp_path).spec.name=='tiny-mae'

def test_adapters_are_not_saved_unmerged(tmp_path):
    import peft
    b = load_backbone('tiny-clip')
    b.model = peft.get_peft_model(b.model, peft.LoraConfig(target_modules=['q_proj', 'v_proj']))
    with pytest.raises(ValueError, match='merge_and_unload'): save_backbone(b, tmp_path)
    b.model = b.model.merge_and_unload()
    assert torch.equal(run(load_backbone(save_backbone(b.eval(), tmp_path)), images()), run(b, images()))

def test_saved_weights_of_another_shape(tmp_path):
    save_backbone(load_backbone('tiny-mae'), tmp_path)
    about = json.loads((tmp_path/'backbone.json').read_text()); about['architecture']['config']['hidden_size'] = 48
    (tmp_path/'backbone.json').write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r'is \(.*96.*\) there but \(.*48.*\) in the model'): load_backbone(tmp_path)

def test_truncated_weights(tmp_path):
    save_backbone(load_backbone('tiny-clip'), tmp_path)
    path = tmp_path/'backbone.safetensors'; path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match='damaged or incomplete'): load_backbone(tmp_path)
    load_backbone('tiny-clip').model.save_pretrained(tmp_path/'hf')
    path = tmp_path/'hf'/'model.safetensors'; path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match='damaged or incomplete'): load_backbone(tmp_path/'hf')

def test_folders_of_before_are_read(tmp_path):
    "The architecture was called recipe once: in the folders of the package it still is."
    b = load_backbone('tiny-clip'); save_backbone(b, tmp_path)
    about = json.loads((tmp_path/'backbone.json').read_text()); about['recipe'] = about.pop('architecture')
    (tmp_path/'backbone.json').write_text(json.dumps(about))
    again = load_backbone(tmp_path)
    assert again.architecture==b.architecture and torch.equal(run(again, images()), run(b, images()))
    assert 'recipe' in json.loads((WEIGHTS/'tiny-clip'/'backbone.json').read_text())

# ---- what is imported

@pytest.mark.parametrize('name,needed', (('tiny-clip','transformers'), ('tiny-supervised','timm'), ('',None)))
def test_a_library_is_imported_when_it_is_needed(name, needed):
    code = 'import sys; from ssl_wikichurches.backbones.encoders import load_backbone; '+f'load_backbone({name!r}); '*bool(name)+'print(*sys.modules)'
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert {'timm','transformers'}&{*found}=={needed}-{None}

# ---- folders in the layout of transformers

@pytest.mark.parametrize('name', HUGGING)
def test_transformers_folder(name, tmp_path):
    b = load_backbone(name)
    again = load_backbone(layout(tmp_path/name, b))
    assert torch.equal(run(again, images()), run(b, images()))
    assert replace(again.spec, name=name, source=b.spec.source)==b.spec and again.spec.name==name
    assert load_backbone(tmp_path/name, size=64).spec.grid==8
    assert torch.equal(run(load_backbone(save_backbone(again, tmp_path/'saved')), images()), run(b, images()))

TOWER = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, image_size=96, patch_size=8)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)

@pytest.mark.parametrize('config,model,tower,stats,n_prefix', ((CLIPConfig, CLIPModel, 'clip', OPENAI, 1), (SiglipConfig, SiglipModel, 'siglip', HALF, 0)))
def test_vision_tower_of_a_full_checkpoint(config, model, tower, stats, n_prefix, tmp_path):
    full = model(config(vision_config=TOWER, text_config=TEXT)).eval()
    full.save_pretrained(tmp_path)
    b = load_backbone(tmp_path)
    assert (b.spec.family, b.spec.n_prefix, b.spec.mean)==(tower, n_prefix, stats['mean'])
    with torch.no_grad(): own = full.vision_model(pixel_values=(images()-b.mean)/b.std).pooler_output
    assert torch.equal(run(b, images()), own)

def test_checkpoints_with_classifier_or_decoder(tmp_path):
    config = AutoConfig.for_model('dinov2_with_registers', **TOWER|dict(mlp_ratio=2), num_register_tokens=4)
    model = Dinov2WithRegistersForImageClassification(config).eval(); model.save_pretrained(tmp_path/'d')
    with torch.no_grad(): own = model.dinov2_with_registers((images()-torch.tensor(IMAGENET['mean']).view(3,1,1))/torch.tensor(IMAGENET['std']).view(3,1,1)).pooler_output
    assert torch.equal(run(load_backbone(tmp_path/'d'), images()), own)
    config = AutoConfig.for_model('vit_mae', **TOWER, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32)
    mae = ViTMAEForPreTraining(config); mae.save_pretrained(tmp_path/'m')
    b = load_backbone(tmp_path/'m')
    assert all(torch.equal(v, mae.vit.state_dict()[k]) for k,v in b.model.state_dict().items())
    assert b.model.config.mask_ratio==0

OLD = { # names as in the published checkpoints, which transformers translates
    'tiny-dinov2': {'attention.q_proj': 'attention.attention.query', 'attention.k_proj': 'attention.attention.key', 'attention.v_proj': 'attention.attention.value', 'attention.o_proj': 'attention.output.dense'},
    'tiny-dinov3': {'model.layer.': 'layer.'},
    'tiny-mae': {'layers.': 'vit.encoder.layer.', 'attention.q_proj': 'attention.attention.query', 'attention.k_proj': 'attention.attention.key', 'attention.v_proj': 'attention.attention.value',
                 'attention.o_proj': 'attention.output.dense', 'mlp.fc1': 'intermediate.dense', 'mlp.fc2': 'output.dense', 'embeddings.': 'vit.embeddings.', 'layernorm.': 'vit.layernorm.'}}

@pytest.mark.parametrize('name', OLD)
def test_names_of_published_checkpoints(name, tmp_path):
    b = load_backbone(name); b.model.save_pretrained(tmp_path)
    state = {}
    for k,v in b.model.state_dict().items():
        for new,old in OLD[name].items():
            if new in ('layernorm.', 'embeddings.', 'layers.', 'model.layer.'): k = old+k[len(new):] if k.startswith(new) else k
            else: k = k.replace(new, old)
        state[k] = v
    save_file(state, tmp_path/'model.safetensors', metadata=dict(format='pt'))
    assert torch.equal(run(load_backbone(tmp_path), images()), run(b, images()))

def test_preprocessor_config_has_the_last_word(tmp_path):
    layout(tmp_path, load_backbone('tiny-dinov2'))
    p = dict(do_center_crop=True, crop_size=dict(height=64, width=64), size=dict(shortest_edge=72), image_mean=[.1,.2,.3], image_std=[.4,.5,.6])
    for change,size in ((dict(), 64), (dict(do_center_crop=False), 72), (dict(do_center_crop=False, size=128), 128), (dict(crop_size=80), 80)):
        (tmp_path/'preprocessor_config.json').write_text(json.dumps(p|change))
        spec = load_backbone(tmp_path).spec
        assert (spec.size, spec.mean, spec.std)==(size, (.1,.2,.3), (.4,.5,.6))
    assert load_backbone(tmp_path, size=96).spec.size==96

# ---- what is refused

def test_missing_weights_are_named(tmp_path):
    for name in HUGGING:
        layout(tmp_path/name, load_backbone(name))
        state = load_file(tmp_path/name/'model.safetensors'); gone = sorted(k for k in state if k.endswith('bias') and 'norm' in k)[-1]; del state[gone]
        save_file(state, tmp_path/name/'model.safetensors', metadata=dict(format='pt'))
        with pytest.raises(ValueError, match='1 not in it: .*bias'): load_backbone(tmp_path/name)

@pytest.mark.parametrize('name', HUGGING)
def test_weights_of_another_width_or_depth(name, tmp_path):
    layout(tmp_path, load_backbone(name))
    config = {k: v for k,v in json.loads((tmp_path/'config.json').read_text()).items() if k not in ('stage_names', 'out_features', 'out_indices')}
    (tmp_path/'config.json').write_text(json.dumps(config|dict(hidden_size=48)))
    with pytest.raises(ValueError, match='other shapes: .* is .*96.* there but .*48.* in the model'): load_backbone(tmp_path)
    (tmp_path/'config.json').write_text(json.dumps(config|dict(num_hidden_layers=5)))
    with pytest.raises(ValueError, match='not in it: .*layers?.4.'): load_backbone(tmp_path)
    (tmp_path/'config.json').write_text(json.dumps(config|dict(num_hidden_layers=3)))
    with pytest.raises(ValueError, match='of no use to the model: .*layers?.3.'): load_backbone(tmp_path)

def test_weights_of_another_family(tmp_path):
    layout(tmp_path/'a', load_backbone('tiny-clip')); layout(tmp_path/'b', load_backbone('tiny-mae'))
    (tmp_path/'a'/'model.safetensors').write_bytes((tmp_path/'b'/'model.safetensors').read_bytes())
    with pytest.raises(ValueError, match='not a checkpoint of this architecture'): load_backbone(tmp_path/'a')

def test_other_model_type(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='resnet')))
    with pytest.raises(ValueError, match="'resnet'.*known are"): load_backbone(tmp_path)

def test_unknown_names(tmp_path):
    for name in ('dinov5', 'random', '', '/no/such/folder', './no', 'a/b/c'):
        with pytest.raises(ValueError, match='known are dinov2, dinov3, mae, clip, siglip, siglip2, supervised, tiny-dinov2'):
            load_backbone(name if name else 'nothing')
    with pytest.raises(ValueError, match='neither backbone.json nor config.json'): load_backbone(tmp_path)

@pytest.mark.parametrize('name', ('clip', 'supervised', 'facebook/vit-mae-base', 'timm/vit_tiny_patch16_224'))
def test_no_network(name, monkeypatch, tmp_path):
    "Without a network the error comes soon and says what to do."
    def refuse(*a, **k): raise OSError('no network in this test')
    monkeypatch.setattr(socket.socket, 'connect', refuse); monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(backbones, 'try_to_load_from_cache', lambda *a: None)
    with pytest.raises(OSError, match='hf download .* --local-dir FOLDER'): load_backbone(name)

# ---- timm

def test_local_timm_checkpoint(tmp_path):
    model = timm.create_model('vit_tiny_patch16_224', depth=12).eval(); path = tmp_path/'w.safetensors'
    save_file(model.state_dict(), path)
    b = load_backbone(f'timm/vit_tiny_patch16_224@{path}')
    assert (b.spec.n_prefix, b.spec.size, b.spec.mean, b.spec.pooling, b.spec.name)==(1, 224, (.5,.5,.5), 'class', 'vit_tiny_patch16_224')
    with torch.no_grad(): own = model.forward_features((images(224, 1)-.5)/.5)[:,0]
    assert torch.equal(run(b, images(224, 1)), own)
    with pytest.raises(ValueError, match=r'other shapes: .* is \(192,\) there but \(384,\) in the model'): load_backbone(f'timm/vit_small_patch16_224@{path}')
    with pytest.raises(ValueError, match=r'patch_embed.proj.weight is \(192, 3, 16, 16\) there but \(192, 3, 32, 32\)'):
        backbones.load_timm('vit_tiny_patch16_224', lambda m: model.state_dict(), 'x', dict(patch_size=32)) # timm would resample the patches
    with pytest.raises(ValueError, match='pos_embed is'): load_backbone(f'timm/vit_tiny_patch16_384@{path}')
    small = load_backbone(f'timm/vit_tiny_patch16_224@{path}', size=96)
    assert small.spec.grid==6 and torch.equal(run(load_backbone(save_backbone(small, tmp_path/'s')), images()), run(small, images()))

def test_timm_names():
    with pytest.raises(ValueError, match='did you mean'): load_backbone('timm/vit_tiny_patch16_2244')
    with pytest.raises(ValueError, match='augreg_in21k'): load_backbone('timm/vit_tiny_patch16_224.nothing@x') if Path('x').exists() else backbones.build_timm('vit_tiny_patch16_224.nothing')
    for other in ('resnet18', 'swin_tiny_patch4_window7_224'):
        with pytest.raises(ValueError, match='no vision transformer with a class token'): backbones.build_timm(other)

def test_timm_dinov3_is_read_by_its_class_token(tmp_path):
    options = dict(depth=2, embed_dim=96, num_heads=4, img_size=64)
    model = timm.create_model('vit_base_patch16_dinov3', num_classes=0, **options).eval()
    assert model.global_pool=='avg'
    b = backbones.load_timm('vit_base_patch16_dinov3', lambda m: model.state_dict(), 'x', options).eval()
    x = images(64)
    with torch.no_grad(): own = model.forward_features((x-b.mean)/b.std)[:,0]
    assert torch.equal(run(b, x), own) and (b.spec.n_prefix, b.spec.mean)==(5, IMAGENET['mean'])

def test_timm_pooling_head(tmp_path):
    options = dict(depth=2, embed_dim=96, num_heads=4, img_size=64)
    model = timm.create_model('vit_base_patch16_siglip_224', num_classes=0, **options).eval()
    b = backbones.load_timm('vit_base_patch16_siglip_224', lambda m: model.state_dict(), 'x', options).eval()
    assert (b.spec.pooling, b.spec.n_prefix)==('head', 0) and len(attention_projections(b))==2
    with torch.no_grad(): assert torch.equal(b(images(64)), model((images(64)-b.mean)/b.std))

def test_timm_model_that_averages_is_refused():
    options = dict(depth=2, embed_dim=96, num_heads=4, img_size=64)
    model = timm.create_model('vit_base_patch16_224', global_pool='avg', num_classes=0, **options)
    with pytest.raises(ValueError, match='averages its patches: its norm stands behind the average'):
        backbones.load_timm('vit_base_patch16_224', lambda m: model.state_dict(), 'x', options)

def test_timm_folder(tmp_path):
    options = dict(depth=3, img_size=96, patch_size=8, embed_dim=96, num_heads=4)
    model = timm.create_model('vit_tiny_patch16_224', num_classes=7, **options).eval()
    save_file(model.state_dict(), tmp_path/'model.safetensors')
    cfg = dict(model.pretrained_cfg, mean=[.1]*3, std=[.2]*3); cfg = {k: v for k,v in cfg.items() if isinstance(v, (int, float, str, list, tuple))}
    (tmp_path/'config.json').write_text(json.dumps(dict(architecture='vit_tiny_patch16_224', num_classes=7, model_args=options, pretrained_cfg=cfg)))
    b = load_backbone(tmp_path)
    assert (b.depth, b.spec.patch, b.spec.mean)==(3, 8, (.1,)*3)
    with torch.no_grad(): assert torch.equal(b(images()), model.forward_features((images()-.1)/.2)[:,0])
    (tmp_path/'model.safetensors').unlink()
    with pytest.raises(ValueError, match='holds no model.safetensors'): load_backbone(tmp_path)

def test_timm_from_the_hub(tmp_path, monkeypatch):
    "The path of the hub, with a checkpoint in the place of the download."
    model = timm.create_model('vit_tiny_patch16_224'); asked = []
    monkeypatch.setattr(backbones, 'try_to_load_from_cache', lambda *a: 'cached')
    monkeypatch.setattr(timm.models, 'load_state_dict_from_hf', lambda repo: asked.append(repo) or model.state_dict())
    b = load_backbone('timm/vit_tiny_patch16_224')
    assert asked==['timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k'] and b.spec.source=='timm/vit_tiny_patch16_224'

def test_registry_is_held_against_what_is_loaded(tmp_path, monkeypatch):
    layout(tmp_path/'m', load_backbone('tiny-mae'))
    for patch in (8, 16):
        monkeypatch.setitem(BACKBONES, 'known', replace(BACKBONES['mae'], name='known', source=str(tmp_path/'m'), patch=patch, size=64))
        if patch==8: assert load_backbone('known').spec==BACKBONES['known']
        else:
            with pytest.raises(ValueError, match='does not look as the registry says'): load_backbone('known')

# ---- real weights

def test_real_vit_tiny_calls_a_church_a_church(real):
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor, resize
    weights = real/'vit_tiny_in1k/model.safetensors'
    b = load_backbone(f'timm/vit_tiny_patch16_224@{weights}')
    assert (b.dim, b.depth, b.n_heads, b.spec.n_prefix, b.spec.mean)==(192, 12, 3, 1, (.5,.5,.5))
    state = load_file(weights)
    hits = []
    for p in sorted((real/'large').glob('*.jpg')):
        x = resize(pil_to_tensor(Image.open(p).convert('RGB')), (224,224), antialias=True)[None]/255
        hits.append((run(b, x)@state['head.weight'].T+state['head.bias']).topk(5).indices[0].tolist())
    # church 497, dome 538, bell cote 442, monastery 663, palace 698, mosque 668: what a church looks like to ImageNet
    assert sum(bool({497,538,442,663,698,668}&set(h)) for h in hits)>=len(hits)-3
    assert sum(497 in h for h in hits)>=len(hits)//2
