"""How fast and how large is a training, beside re-encoding and beside Hugging Face's `Trainer`, and what does attention supervision add? Ratios within one run.

    python benchmarks/training.py [--model tiny-clip] [--repeats 3] [--pairs 24]

All ways train the same model on the same photographs, with the same batches, precision, optimizer and augmentation. They take turns in many short
trainings, in both orders, because machines drift; what is printed is the median of the paired ratios, their mean and its standard error. A step is from the end of one optimizer step to the end of the next. Memory is the peak of a fresh process for each way.
"""
import argparse, subprocess, sys, tempfile, time, warnings
from dataclasses import replace
import numpy as np, pandas as pd, torch
from memory import peak_megabytes
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PrinterCallback, Trainer, TrainingArguments
from ssl_wikichurches.finetune.attn_supervised import AttnSupervisedRecipe, fit_attn_supervised
from ssl_wikichurches.backbones.encoders import load_backbone
from ssl_wikichurches.data.churches import ChurchDataset, eval_transform, train_transform
from ssl_wikichurches.data.download import load_churches
from ssl_wikichurches.finetune.training import StyleModel, TrainData, new_classifier, train
from ssl_wikichurches.finetune.full import FullRecipe, fit_full, parameter_groups
from ssl_wikichurches.finetune.linear import LinearRecipe, fit_linear
from ssl_wikichurches.finetune.lora import LoraRecipe, add_adapters, fit_lora
from ssl_wikichurches.data.splits import make_split

class WithLoss(torch.nn.Module):
    "What `Trainer` wants of a model: the loss, from the batch."
    def __init__(self, model, weight): super().__init__(); self.model,self.weight = model,weight
    def forward(self, images, labels):
        logits = self.model(images)
        return dict(loss=F.cross_entropy(logits, labels, self.weight), logits=logits)

def batch(items): return dict(images=torch.stack([i['image'] for i in items]), labels=torch.tensor([i['label'] for i in items]))

def by_trainer(model, data, recipe, groups):
    "The same training by `Trainer`: groups, schedule, clipping, shuffling, augmentation, and validation after every epoch."
    images,val = (ChurchDataset(data.churches, getattr(data.split, p), f(data.size), data.labels) for p,f in (('train',train_transform), ('val',eval_transform)))
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(out, per_device_train_batch_size=recipe.batch, num_train_epochs=recipe.epochs, max_grad_norm=recipe.clip, lr_scheduler_type='cosine',
                                 warmup_steps=round(recipe.warmup*recipe.epochs*-(-len(images)//recipe.batch)), use_cpu=not torch.cuda.is_available(), report_to=[],
                                 save_strategy='no', eval_strategy='epoch', per_device_eval_batch_size=recipe.batch, label_names=['labels'], logging_strategy='no', disable_tqdm=True, remove_unused_columns=False, dataloader_num_workers=0)
        optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
        trainer = Trainer(WithLoss(model, data.weight(recipe)), args, train_dataset=images, eval_dataset=val, data_collator=batch, optimizers=(optimizer, None))
        trainer.remove_callback(PrinterCallback)
        trainer.train()

def full_by_trainer(backbone, data, recipe):
    model = StyleModel(backbone, new_classifier(backbone.dim))
    by_trainer(model, data, recipe, parameter_groups(model, recipe))

def lora_by_trainer(backbone, data, recipe):
    add_adapters(backbone, recipe)
    model = StyleModel(backbone, new_classifier(backbone.dim))
    by_trainer(model, data, recipe, [dict(params=[p for p in model.parameters() if p.requires_grad], lr=recipe.lr)])

def linear_encoding_anew(backbone, data, recipe):
    "A probe whose backbone sees every photograph in every epoch."
    model = StyleModel(backbone.requires_grad_(False), new_classifier(backbone.dim))
    group = dict(params=list(model.classifier.parameters()), lr=recipe.lr)
    train(model, [group], data.loaders(recipe, 0), recipe, train_mode=model.eval)

WAYS = {'linear, cached': (fit_linear, LinearRecipe), 'linear, encoding anew': (linear_encoding_anew, LinearRecipe), 'lora': (fit_lora, LoraRecipe),
        'lora by Trainer': (lora_by_trainer, LoraRecipe), 'full': (fit_full, FullRecipe), 'full by Trainer': (full_by_trainer, FullRecipe),
        'attn_supervised': (fit_attn_supervised, AttnSupervisedRecipe)}

def run(way, model, epochs):
    "One training of 320 photographs, and four for validation: its seconds, and those of its median step, loading included."
    churches = load_churches('synthetic')
    split = make_split(churches)
    backbone = load_backbone(model)
    data = TrainData(churches, replace(split, train=split.train[:320], val=split.val[:4]), backbone.spec.size)
    fit,recipe = WAYS[way]
    recipe = recipe(epochs=50 if 'linear' in way else epochs)
    start,ends = time.perf_counter(),[]
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter())) # sees the steps of whatever loop
    fit(backbone, data, recipe)
    hook.remove()
    return time.perf_counter()-start,np.median(np.diff(ends))

def peak(way, model):
    "Megabytes of a fresh process that trains one epoch this way, and of one that only loads model and photographs."
    before = peak_megabytes()
    run(way, model, 1)
    return f'{before:.0f} {peak_megabytes():.0f}'

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', default='tiny-clip'); p.add_argument('--repeats', type=int, default=3); p.add_argument('--pairs', type=int, default=24)
    p.add_argument('--peak', help=argparse.SUPPRESS)
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    if a.peak: return print(peak(a.peak, a.model))
    rows = []
    for ours,theirs,what,i,pairs in (('linear, cached','linear, encoding anew','whole training',0,a.repeats), ('lora','lora by Trainer','step',1,a.pairs), ('full','full by Trainer','step',1,a.pairs), ('full','attn_supervised','step',1,a.pairs)):
        for way in (ours,theirs)[:i+1]: run(way, a.model, 1) # a warm-up
        found = [{way:run(way, a.model, 1)[i] for way in (ours,theirs)[::1 if k%2 else -1]} for k in range(pairs)] # each is first as often as last
        ratio = pd.Series([f[theirs]/f[ours] for f in found])
        rows.append(dict(ours=ours, beside=theirs, of=what, times_faster=ratio.median(), mean=ratio.mean(), standard_error=ratio.sem(), pairs=pairs))
    print(pd.DataFrame(rows).set_index('ours').round(3).to_string())
    memory = {}
    for way in WAYS:
        out = subprocess.run([sys.executable, __file__, '--peak', way, '--model', a.model], capture_output=True, text=True, check=True).stdout
        base,top = map(float, out.split()[-2:])
        memory[way] = dict(peak_MB=round(top), above_imports_MB=round(top-base))
    print(pd.DataFrame(memory).T.to_string())

if __name__=='__main__': main()
