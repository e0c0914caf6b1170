"Does a study find, four times out of five, the share of the attention that `detectable_mass` names? Planted studies, with other chance: python benchmarks/planted.py"
import pandas as pd, torch
from fastcore.script import call_parse
from ssl_wikichurches.attention.capture import pooled_maps
from ssl_wikichurches.backbones.encoders import load_backbone
from ssl_wikichurches.data.churches import ChurchDataset, church_id, eval_transform
from ssl_wikichurches.data.download import load_churches
from ssl_wikichurches.stats.planted import detectable_mass, planted_power, planted_scores

def rows(model, metrics, seeds, moved, studies):
    backbone,churches = load_backbone(model),load_churches('world-parts')
    items = [*ChurchDataset(churches, sorted(churches.boxes.image.unique()), eval_transform(backbone.spec.size, 'squash'))]
    boxes,names = [i['boxes'] for i in items],[i['name'] for i in items]
    maps = pooled_maps(backbone, torch.stack([i['image'] for i in items]))[:,-1].mean(1)
    of = maps,boxes,names,backbone.spec.size,[*map(church_id, names)]
    promised = detectable_mass(*of, metrics=metrics, seeds=seeds, moved=moved)
    for metric,g in promised.groupby('metric', sort=False):
        before,*after = planted_scores(*of, (0,*g.share), (metric,), moved, draws=len(maps)-1, seed=1)[metric].swapaxes(0, 1) # every other church once
        for k,r in enumerate(g.itertuples()):
            for share,scores,expected in ((0,before,.025),(r.share,after[k],r.power)):
                found = planted_power(before, scores, r.seeds, studies=studies, seed=1)
                yield dict(model=model, metric=metric, n=r.n, seeds=r.seeds, moved=moved, share=share, promised=expected, found=found)

@call_parse
def main(
    out:str='results/statistics/planted.csv',
    models:str='tiny-dinov2,tiny-clip,tiny-siglip', # with commas
    studies:int=4000, # of each row
):
    "Write the promised and the found power of planted studies."
    torch.set_num_threads(1)
    table = [r for m in models.split(',') for r in rows(m, ('iou@90','shuffled_auroc'), (1,3,5), .1, studies)]
    pd.DataFrame(table).round(6).to_csv(out, index=False)
    print(pd.DataFrame(table).round(4).to_string())
