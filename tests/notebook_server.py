"""Run notebooks as nbdev_test does, and files of tests, each in a process of its own, without paying for the imports each time.

This process imports what most notebooks import from elsewhere, and forks for every notebook: the child has the libraries and nothing of
another notebook. It reads one JSON line a request (path, arguments, parameters, env, seconds, log) and answers with one (rc). It has one thread, so that forking is safe."""
import json
import os
import signal
import sys
import time
from pathlib import Path


def smaller(parameters):
    "Let notebooks take these values, as papermill gives them: right after the cell that is tagged for them."
    import nbdev.test
    plain = nbdev.test.NBProcessor
    def made(*args, **kwargs):
        out = plain(*args, **kwargs)
        cell, = (c for c in out.nb.cells if 'parameters' in c.metadata.get('tags', []))
        cell.source += ''.join(f'\n{name} = {value!r}' for name, value in parameters.items())
        return out
    nbdev.test.NBProcessor = made


def run(path, env, log, arguments=(), parameters=None):
    "In the child: run one notebook, or pytest with arguments on a file of tests, and end the process with its state."
    os.environ.update(env)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2): os.dup2(out, stream)
    if path.endswith('.py'):
        code = 1
        try:
            import pytest
            code = int(pytest.main([*arguments, path]))
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    from nbdev.config import get_config
    from nbdev.test import test_nb
    if parameters: smaller(parameters)
    config, code = get_config(), 1
    try: code = int(not test_nb(Path(path), skip_flags=config.tst_flags.split(), basepath=config.config_path)[0])
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait(pid, seconds):
    "Give the exit state of a child, or kill it with all it started."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, state = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(state)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 'ran out of time'


def main():
    import IPython, nbdev.test, matplotlib.pyplot, pandas, pandera.pandas, scipy.stats, seaborn, sklearn.linear_model, sklearn.metrics, torch  # noqa: E401, F401
    import accelerate, cv2, hypothesis, imagecodecs, PIL.Image, pyarrow.parquet, pydicom, safetensors.torch, torch.utils.tensorboard, transformers  # noqa: E401, F401
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer  # noqa: F401
    torch.set_num_threads(1)
    answer = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    for line in sys.stdin:
        ask = json.loads(line)
        pid = os.fork()
        if not pid:
            os.setsid()
            sys.stdin.close()
            run(ask['path'], ask['env'], ask['log'], ask['arguments'], ask['parameters'])
        answer.write(json.dumps({'rc': wait(pid, ask['seconds'])}) + '\n')
        answer.flush()


if __name__ == '__main__': main()
