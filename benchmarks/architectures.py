"""Which vision models of timm and transformers can be measured, and are the maps of those what their own attention computes?

    nice -n 10 python benchmarks/architectures.py             # some minutes; writes results/architectures.csv
    python benchmarks/architectures.py --only vit_tiny,dinov2 # names that contain one of these; prints the table and writes nothing

One of each kind: of timm the smallest (by its name) of every kind of plain transformer, and one of every module of others; of transformers every type that
classifies images or serves as a backbone. Weights are random, attention is made uneven, and plain transformers have two blocks. A model that loads is held to
attention without a fused kernel: the softmax that the library itself computes then. Any other error than a refusal in one sentence ends the script."""
import argparse, copy, json, os, re, sys, tempfile, warnings
from pathlib import Path
if __name__=='__main__': os.environ.setdefault('OMP_NUM_THREADS', '1'); os.environ['HF_HUB_OFFLINE'] = '1' # before libraries read them; not where a test imports this
import pandas as pd, timm, torch, transformers
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from ssl_wikichurches.attention.capture import pooled_maps
from ssl_wikichurches.backbones.encoders import load_backbone
from ssl_wikichurches.backbones.registry import FAMILIES

PLAIN = ('vision_transformer','eva','beit','deit','vision_transformer_relpos','vision_transformer_hybrid','naflexvit','cait','xcit','convit','tnt',
         'vision_transformer_sam')
OTHERS = ('swin_transformer','swin_transformer_v2','pvt_v2','mvitv2','hiera','hieradet_sam2','levit','maxxvit','twins','coat','crossvit','davit','volo','pit',
          'nest','gcvit','tiny_vit','efficientformer','mobilevit','vitamin','visformer','metaformer','focalnet','fastvit','gemma4_vit','qwen3_vit',
          'deepseek_vit','mlp_mixer','convnext','resnet')
SIZES = ('tiny ti nano dpwee pwee wee dwee xsmall xxs24 little dlittle xs24 small s s24 medium mediumd xxs36 s36 betwixt base b m36 m48 so150m so150m2 '
         'intern300m large so400m plus huge giant giantopt gigantic enormous 1b 3b 5b 7b').split() # rising

def kind_of(name):
    "A name without size, patch and resolution."
    return '_'.join(w for w in name.split('_') if w not in SIZES and not re.fullmatch(r'\d+|p\d+|patch\d+|s\d+|r\d*|resnet\d+d', w))

def size_of(name):
    "What puts names of one kind in order: word for the size, then large patches first."
    return min((SIZES.index(w) for w in name.split('_') if w in SIZES), default=len(SIZES)),-int((re.findall(r'patch(\d+)', name) or [0])[0]),len(name),name

def timm_names():
    "The smallest of every kind of plain transformer, and one of every module of others."
    kinds = {}
    for name in timm.list_models(exclude_filters='test_*'):
        module = timm.models.model_entrypoint(name).__module__.rpartition('.')[2]
        if module in (*PLAIN, *OTHERS): kinds.setdefault((module, kind_of(name) if module in PLAIN else ''), []).append(name)
    return [min(names, key=size_of) for (module,_),names in kinds.items()]

def uneven(model):
    "Weights that make attention uneven."
    with torch.no_grad():
        for k,p in model.named_parameters():
            if 'gamma' in k or 'lambda' in k: p.fill_(1.)
            elif p.ndim>1 and re.search('attn|attention', k): p.mul_(min(4, 4*(192/p.shape[1])**.5)) # alike at every width
    return model.eval()

class Softmaxes(TorchFunctionMode):
    "Context manager: `seen` has the result of every softmax of four dimensions."
    def __init__(self): super().__init__(); self.seen = []
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (F.softmax, torch.softmax, torch.Tensor.softmax) and out.ndim==4: self.seen.append(out)
        return out

def unfused_rows(backbone, x):
    "What the library's own slow attention gives for the maps, (batch, blocks, heads, patches)."
    backbone = copy.deepcopy(backbone)
    model,s = backbone.model,backbone.spec
    if s.family=='timm':
        fused = [m for m in model.modules() if getattr(m, 'fused_attn', False)]
        for m in fused: m.fused_attn = False
    else:
        slow = type(model)._from_config(model.config, attn_implementation='eager', **FAMILIES[s.family].options).eval() # some choose the classes of their attention when they are made
        slow.load_state_dict(model.state_dict()); backbone.model = model = slow
    with torch.no_grad(), Softmaxes() as soft: backbone(x)
    if s.pooling=='class': return torch.stack([a[:,:,0,s.n_prefix:] for a in soft.seen], 1)
    if s.pooling=='mean': return torch.stack([a[:,:,s.n_prefix:,s.n_prefix:].mean(2) for a in soft.seen], 1)
    if s.family!='timm': # the head is an nn.MultiheadAttention
        tokens = model(**backbone._inputs(x)).last_hidden_state
        return model.head.attention(model.head.probe.repeat(len(x),1,1), tokens, tokens, average_attn_weights=False)[1][:,:,0][:,None]
    return soft.seen[-1][:,:,0,-s.grid**2:][:,None]

def timm_folder(folder, name):
    options = {}
    for more in (dict(depth=2), {}): # most take a number of blocks
        try: model = timm.create_model(name, **more); options = more; break
        except Exception: continue
    save_file({k:v.contiguous().clone() for k,v in uneven(model).state_dict().items()}, folder/'model.safetensors')
    (folder/'config.json').write_text(json.dumps(dict(architecture=name, model_args=options)))

TOWERS = ('clip_vision_model','siglip_vision_model','siglip2_vision_model','metaclip_2_vision_model','chinese_clip_vision_model','blip_2_vision_model',
          'altclip_vision_model','clipseg_vision_model','xclip_vision_model','vit_mae','vit_msn','ijepa','mlcd')
TWO = {'clip','siglip','siglip2','metaclip_2','shieldgemma2','tipsv2','timm_wrapper','timm_backbone'} # have two towers, or are timm's

def transformers_types():
    from transformers.models.auto import modeling_auto as auto
    return sorted({*auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, *auto.MODEL_FOR_BACKBONE_MAPPING_NAMES, *TOWERS}-TWO)

def transformers_folder(folder, name):
    family = next((f for f in FAMILIES.values() if name in f.types), None)
    if family is None: return (folder/'config.json').write_text(json.dumps(dict(model_type=name))) # its type is enough to be refused
    small = dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=4, patch_size=16)|(dict(num_patches=16) if family.patchified else dict(image_size=64))|family.tiny
    uneven(transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **small), **family.options)).save_pretrained(folder)

def outcome(folder, name, make):
    "Exact or refused, largest difference, largest weight of a map, and the sentence."
    make(folder, name)
    try: backbone = load_backbone(folder)
    except ValueError as e: return dict(outcome='refused', reason=str(e).replace(f'{folder.parent}/', ''))
    x = torch.rand(1, 3, *[backbone.spec.size]*2, generator=torch.Generator().manual_seed(0))
    maps = pooled_maps(backbone, x).flatten(-2); rows = unfused_rows(backbone, x)
    if maps.shape!=rows.shape or (gap := (maps-rows).abs().max().item())>1e-4:
        raise SystemExit(f'{name}: maps {tuple(maps.shape)} are not those of its own attention {tuple(rows.shape)}')
    s = backbone.spec
    return dict(outcome='exact', difference=float(f'{gap:.1e}'), largest=round(maps.max().item(), 3), pooling=s.pooling, tokens=f'{s.n_prefix}+{s.grid}x{s.grid}')

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='parts of names, with commas')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent.parent/'results'/'architectures.csv')
    args = parser.parse_args()
    warnings.filterwarnings('ignore'); transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar(); torch.set_num_threads(1)
    wanted = lambda n: not args.only or any(part in n for part in args.only.split(','))
    todo = [('timm', n, timm_folder) for n in timm_names()]+[('transformers', n, transformers_folder) for n in transformers_types()]
    todo = [t for t in todo if wanted(t[1])]
    rows = []
    for library,name,make in todo:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as tmp:
            (folder := Path(tmp)/name).mkdir()
            rows.append(dict(library=library, architecture=name, **outcome(folder, name, make)))
        if not args.only: pd.DataFrame(rows).sort_values(['outcome','library','architecture']).to_csv(args.out, index=False)
        print(f"{len(rows)}/{len(todo)}", *(v for v in rows[-1].values()), file=sys.stderr, flush=True)
    table = pd.DataFrame(rows).sort_values(['outcome','library','architecture'])
    print(table.to_string(index=False))
    if not args.only: print(f'{len(table)} architectures: {args.out}')
