"""What notebooks with parameters run on in the tests: the same cells, on less than their defaults, which are for a reader's first look."""
import json
import re

RESAMPLES = 24 # of every bootstrap that a parameter names `n_boot`
SMALLER = {
    'b40_step': dict(height=64, width=64, repeats=2),
    'b41_gradcache': dict(batches=[4, 8], repeats=2),
    'b52_label_efficiency': dict(height=96, width=64, seeds=[0, 1], repeats=1, full_height=760, full_width=456),
    'b60_import': dict(repeats=1),
    'b66_attributions': dict(images=1, masks=8, channels=8, steps=4, size=112, repeats=1),
    'e39_levels': dict(seeds=[0, 1]),
    'e41_attribution_comparison': dict(n_prompts=6, epochs=1, sanity_images=2, stages=2),
    'e43_attribution_bench': dict(findings=['mass', 'suspicious_calcification'], images=3, absent=2, tune=2, faithful=1, noisy=1, baselines=['blur', 'road']),
    'e44_causal_truth': dict(population=60, patients=3, steps=4, samples=2, masks=16),
    'e49_oversight': dict(reports=12),
    'e50_mammo_clip': dict(factor_epochs=1, jobs=1),
    'e63_demo_search': dict(exams=8),
    'e81_real_alignment': dict(images=24),
    'e83_xvl_parts': dict(studies=20, reports=40),
    'e84_features_over_training': dict(moments=2, exams=12),
    'e85_a2i2_learns': dict(exams=20, mapped=8),
}


def smaller(path):
    "name -> value for a notebook, or None; a value for a parameter that it does not have is refused."
    cells = [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    if not cells: return None
    known = set(re.findall(r'^(\w+)', cells[0], re.M))
    values = {**({'n_boot': RESAMPLES} if 'n_boot' in known else {}), **SMALLER.get(path.stem, {})}
    assert set(values) <= known, f'{path.name} has no parameter {sorted(set(values) - known)}'
    return values
