"""A page without a browser, whose visitors never sit still."""

from dataclasses import replace

from fourdfy.viewing.controls import Controls
from fourdfy.viewing.views import VIEWS


class FakePage:
    """Moves two cameras and the time at every look, and shows each view in turn."""

    def __init__(self, cfg, scenery):
        self.cfg, self.scenery, self.controls = cfg, scenery, Controls()
        self.images, self.looks, self.notes, self.told, self.closed = [], {}, [], [], False
        self.on_eyes = lambda: None

    def eyes(self):
        self.on_eyes()
        number = len(self.images)
        self.controls.view = [*VIEWS][number % len(VIEWS)]
        self.controls.playback.seek(number % 10 / 10)
        eye = replace(self.scenery.eye, fovy_deg=40.0 + number % 20)
        return {0: eye, 1: replace(eye, aspect=0.5)}

    def show(self, client, image):
        self.images.append((client, self.controls.view, image))

    def show_time(self, moment):
        pass

    def show_paused(self):
        self.notes.append("paused" if self.controls.paused else "resumed")

    def tell(self, progress, run, taken):
        self.told.append((progress.status(run, taken), progress.losses(), progress.groups(run)))

    def show_look(self, kind, images):
        self.looks[kind] = images

    def notify(self, text):
        self.notes.append(text)

    def close(self):
        self.closed = True
