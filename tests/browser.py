"""A page in headless Chromium, asked through its debugging port: sizes, texts, clicks, pictures. Needs no package beyond what JupyterLab brings."""
import base64
import contextlib
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
REASON = 'no Chromium on this machine: apt-get install chromium'


class Browser:
    "One Chromium with one page."
    def __init__(self):
        import websocket
        self.profile, self.number = tempfile.TemporaryDirectory(ignore_cleanup_errors=True), itertools.count(1)
        command = [CHROMIUM, '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--hide-scrollbars', '--remote-debugging-port=0', f'--user-data-dir={self.profile.name}', 'about:blank']
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        port = next((m[1] for line in self.process.stderr if (m := re.search(r'ws://127\.0\.0\.1:(\d+)/', line))), None)
        assert port, 'Chromium did not start'
        target = next(t for t in json.load(urlopen(f'http://127.0.0.1:{port}/json')) if t['type'] == 'page')
        self.socket = websocket.create_connection(target['webSocketDebuggerUrl'], timeout=120, suppress_origin=True)
        for domain in ('Page', 'Runtime', 'Network'): self.call(f'{domain}.enable')
        self.asked = [] # addresses beyond files

    def call(self, method, **params):
        "One command of the DevTools protocol."
        number = next(self.number)
        self.socket.send(json.dumps(dict(id=number, method=method, params=params)))
        while True:
            got = json.loads(self.socket.recv())
            if got.get('method') == 'Network.requestWillBeSent' and not got['params']['request']['url'].startswith(('file:', 'data:', 'about:')): self.asked.append(got['params']['request']['url'])
            if got.get('id') == number:
                if 'error' in got: raise RuntimeError(got['error'])
                return got.get('result', {})

    def open(self, url, width=1200, height=900, dark=False, seconds=60):
        "Show an address, or a file, and wait until it is there."
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')])
        self.call('Page.navigate', url=url if '://' in str(url) else Path(url).resolve().as_uri())
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.run('return document.readyState') == 'complete' and self.run('return location.href') != 'about:blank': return self
            time.sleep(.05)
        raise TimeoutError(url)

    def run(self, body):
        "What a function body in JavaScript returns."
        got = self.call('Runtime.evaluate', expression=f'(async () => {{{body}}})()', awaitPromise=True, returnByValue=True)
        if 'exceptionDetails' in got: raise RuntimeError(got['exceptionDetails'].get('exception', {}).get('description', got['exceptionDetails']['text']))
        return got['result'].get('value')

    def picture(self, path, whole=False):
        "A screenshot of what is seen, or of the whole page."
        Path(path).write_bytes(base64.b64decode(self.call('Page.captureScreenshot', format='png', captureBeyondViewport=whole)['data']))

    def close(self):
        with contextlib.suppress(Exception): self.socket.close()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired): self.process.wait(10)
        if self.process.poll() is None: self.process.kill()
        self.process.stderr.close()
        self.profile.cleanup()
