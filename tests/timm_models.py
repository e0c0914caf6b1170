"Small models of timm's, with weights that make attention uneven."
import torch
from ssl_wikichurches.backbones import encoders as backbones

def timm_model(architecture):
    options = dict(depth=3, embed_dim=96, num_heads=4, img_size=64, patch_size=16)
    if architecture.startswith(('beit','eva02')): options['global_pool'] = 'token' # they average their patches unless told otherwise
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(2)
        model = backbones.build_timm(architecture, **options)
        for k,p in model.named_parameters():
            if 'gamma' in k: p.fill_(1.)
            elif p.ndim>1 and 'attn' in k: p.mul_(4)
    return backbones.load_timm(architecture, lambda m: model.state_dict(), architecture, options).eval()
