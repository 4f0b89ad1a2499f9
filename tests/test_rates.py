"""The learning rate has one owner: what schedules, callbacks and the user's code say is multiplied in one place."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from fastai.data.core import DataLoaders
from fastai.optimizer import SGD, Adam, ranger
from hypothesis import given, settings
from hypothesis import strategies as st

import ftlib
from ftlib.callbacks.stopping import EarlyStopping, RecoverFromNaN
from ftlib.callbacks.trackers import ReduceLROnPlateau
from ftlib.models.cnn import cnn
from ftlib.train.learner import Learner


class Batches:
    "Three batches of fixed random numbers"
    dataset, bs, n, device = range(24), 8, 24, torch.device('cpu')
    def __len__(self): return 3
    def __iter__(self): return ((torch.full((8, 4), i + 1.), torch.ones(8, 1)) for i in range(3))


class Call(Callback):
    "Does what it is given at an event"
    uses_images = False
    def __init__(self, event, do, order=0):
        self.order = order
        setattr(self, event, lambda: do(self))


def learner(**kwargs):
    torch.manual_seed(0)
    return Learner(DataLoaders(Batches(), Batches()), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)),
                   loss_func=torch.nn.MSELoss(),
                   **dict(splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())]) | kwargs)


def fitted(learn, *args, how='fit', **kwargs):
    "The learning rates that the optimizer used at each step, for each group"
    used = []
    def note(cb): used.append([h['lr'] for h in cb.opt.hypers])
    with learn.no_bar(), learn.no_logging():
        getattr(learn, how)(*args, cbs=[Call('before_step', note, 10_000), *kwargs.pop('cbs', [])], **kwargs)
    return np.array(used)


def _reductions(epoch, patience):
    "How often a plateau's callback has reduced the rate before an epoch, if only the first epoch is an improvement"
    return max(epoch - 1, 0) // patience


SCHEDULES = dict(none=None, linear='linear', step='step', own=lambda epoch, n: 1 / (1 + epoch))


@settings(max_examples=25, deadline=None)
@given(schedule=st.sampled_from(sorted(SCHEDULES)), patience=st.integers(1, 3), divide=st.floats(1.5, 20),
       at=st.integers(0, 4), share=st.floats(.01, .9),
       raw=st.booleans(), opt_func=st.sampled_from([Adam, SGD, torch.optim.AdamW, torch.optim.SGD]))
def test_factors_multiply(schedule, patience, divide, at, share, raw, opt_func):
    "Whatever the schedule is and whichever callback comes first"
    f, n, lrs = SCHEDULES[schedule], 5, np.array([1e-3, 1e-2])
    by = (lambda e, n: 1.) if f is None else getattr(ftlib, f.capitalize())() if isinstance(f, str) else f
    half = Call('before_epoch', lambda cb: cb.learn.learning_rates.factor('mine', share) if cb.epoch == at else None)
    plateau = ReduceLROnPlateau(min_delta=1e9, patience=patience, factor=divide)
    cbs, kwargs = [plateau, half], dict(schedule=f)
    if raw and f is not None: cbs, kwargs = [half, plateau, ParamScheduler({'lr': lambda p: lrs * by(p * n, n)})], {}
    used = fitted(learner(opt_func=opt_func), n, lrs.tolist(), cbs=cbs, **kwargs)
    expected = [lrs * by(i / 3, n) * (share if i // 3 >= at else 1) * divide ** -_reductions(i // 3, patience)
                for i in range(15)]
    np.testing.assert_allclose(used, expected, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(event=st.sampled_from(['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_pred', 'before_step',
                              'after_step', 'after_batch', 'after_epoch']),
       order=st.sampled_from([-5, 0, 59, 61, 64, 100]), how=st.sampled_from(['set_hyper', 'item', 'slice', 'multiply']),
       scheduled=st.booleans(),
       opt_func=st.sampled_from([Adam, SGD, torch.optim.AdamW]))
def test_what_a_users_callback_writes_counts_as_in_fastai(event, order, how, scheduled, opt_func):
    "The same rates at each step as under fastai's own learner"
    def write(cb):
        if event not in ('before_fit',) and (cb.epoch, getattr(cb, 'iter', 0)
                                             if event not in ('before_epoch', 'before_train') else 0)[0] != 1:
            return
        if how == 'set_hyper': cb.opt.set_hyper('lr', [2e-4, 3e-4])
        elif how == 'item': cb.opt.hypers[1]['lr'] = 5e-4
        elif how == 'slice': cb.opt.set_hyper('lr', slice(1e-5, 1e-4))
        else:
            for h in cb.opt.hypers: h['lr'] *= .5
    def run(cls):
        torch.manual_seed(0)
        learn = cls(DataLoaders(Batches(), Batches()), torch.nn.Sequential(torch.nn.Linear(4, 4),
            torch.nn.Linear(4, 1)), loss_func=torch.nn.MSELoss(),
                    opt_func=opt_func if opt_func is not torch.optim.AdamW else partial(_wrapped, opt=opt_func),
                    splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())])
        return fitted(learn, 3, slice(1e-3, 1e-2), how='fit_one_cycle' if scheduled else 'fit',
                      cbs=[Call(event, write, order)])
    np.testing.assert_allclose(run(Learner), run(ftlib_fastai()), rtol=1e-5)


def ftlib_fastai():
    import fastai.vision.all  # noqa: F401  gives the learner its fit_one_cycle
    from fastai.learner import Learner as FastaiLearner
    return FastaiLearner


def _wrapped(params, opt, lr):
    from fastai.optimizer import OptimWrapper
    return OptimWrapper([dict(params=list(p)) for p in params], opt, lr=lr)


def test_a_rate_written_between_reductions_is_the_new_base():
    writes = {1: 4e-3, 4: 8e-3}
    user = Call('before_epoch', lambda cb: cb.opt.set_hyper('lr', writes[cb.epoch]) if cb.epoch in writes else None)
    used = fitted(learner(), 6, 1e-2, cbs=[user, ReduceLROnPlateau(min_delta=1e9, patience=2, factor=4)])[::3, 0]
    np.testing.assert_allclose(used, [1e-2, 4e-3, 4e-3, 1e-3, 8e-3, 2e-3], rtol=1e-9)


class Loses(torch.nn.Sequential):
    "A network whose output is not finite in two of its calls"
    def forward(self, x):
        self.calls = getattr(self, 'calls', 0) + self.training
        return super().forward(x) * (float('nan') if self.training and self.calls in (5, 11) else 1.)


@pytest.mark.parametrize('how', ['fit', 'fit_one_cycle', 'raw'])
def test_recovery_and_plateau_together(how):
    "Both factors apply; the rates of the state that recovery goes back to do not come back with it"
    lrs = np.array([1e-3, 1e-2])
    learn = learner()
    learn.model = Loses(*learn.model)
    kwargs, cbs = {}, [RecoverFromNaN(lr_divisor=5, check_every=1), ReduceLROnPlateau(min_delta=1e9, patience=2)]
    if how == 'raw': cbs.append(ParamScheduler({'lr': lambda p: lrs * (1 - p / 2)}))
    used = fitted(learn, 6, lrs.tolist(), how='fit' if how == 'raw' else how, cbs=cbs, **kwargs)
    plain = fitted(learner(), 6, lrs.tolist(), how='fit' if how == 'raw' else how, cbs=cbs[2:])
    shares = [.2 ** ((i > 4) + (i > 10)) * .1 ** _reductions(i // 3, 2) for i in range(18)]
    np.testing.assert_allclose(used, plain * np.array(shares)[:, None], rtol=1e-5)
    assert learn.history.lr.iloc[-1] == used[-1, -1]


def test_a_cooldown_replaces_the_schedule_and_other_factors_still_apply():
    "From the rates of the best epoch to zero; a loss of NaN in it divides the rest of it"
    class Rises(Callback):
        uses_images, order = False, 54
        def after_validate(self):
            self.learn.final_record[1] = 1. if self.epoch in (0, 2) else 2. if self.epoch < 2 else 3.
    for lost in (False, True):
        learn, stop = learner(), EarlyStopping(min_delta=.5, patience=2, cooldown=3)
        cbs = [stop, RecoverFromNaN(lr_divisor=5, check_every=1),
               Call('after_batch', lambda cb: setattr(cb.learn, 'loss', cb.learn.loss * float('nan')) if lost
                    and cb.training and cb.epoch == 4 and cb.iter == 0 else None)]
        used = fitted(learn, 12, [1e-3, 1e-2], how='fit', schedule='step', cbs=cbs)
        first = 3 * (stop.stopped_at + 1)
        cosine = (1 + np.cos(np.pi * np.arange(9) / 9)) / 2
        share = np.where(np.arange(9) > (12 - first), .2 if lost else 1., 1.)
        assert len(used) == first + 9, (len(used), first)
        np.testing.assert_allclose(used[first:, 1], 1e-2 * cosine * share, rtol=1e-9)


def test_the_rates_after_a_resumed_fit_are_those_of_one_that_was_not_interrupted(tmp_path):
    def fit(checkpoint, **kwargs):
        learn = learner()
        cbs = [ReduceLROnPlateau(min_delta=1e9, patience=1, factor=3.), RecoverFromNaN()]
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(5, slice(1e-3, 1e-2), cbs=cbs, checkpoint=checkpoint, **kwargs)
        return learn.epoch_log.steps().lr.tolist()
    class Interrupted(ftlib.Checkpoint):
        "Interrupts the fit after a checkpoint in the middle of its fourth epoch"
        def save(self, learn, epoch, step=0, *args, **kwargs):
            super().save(learn, epoch, step, *args, **kwargs)
            if (epoch, step) == (3, 2): raise KeyboardInterrupt
    whole = fit(ftlib.Checkpoint(tmp_path/'whole', every=2))
    with pytest.raises(KeyboardInterrupt): fit(Interrupted(tmp_path/'cut', every=2))
    assert fit(ftlib.Checkpoint(tmp_path/'cut', every=2), resume=True) == whole
    assert len(whole) == 15 and whole[-1] < whole[0]


@pytest.mark.parametrize('opt_func', [Adam, SGD, ranger, torch.optim.RMSprop], ids=lambda f: f.__name__)
@pytest.mark.parametrize('k', [2, 3, 5])
def test_fewer_values_than_stages_are_dealt_out(opt_func, k):
    "As notebooks write for fastai's networks of three groups; the last is the head's, the first the stem's"
    net = cnn(2, channels=(4,) * 6, size=64)
    learn = Learner(DataLoaders(Batches(), Batches()), net, loss_func=torch.nn.CrossEntropyLoss(), opt_func=opt_func)
    learn.create_opt()
    n, values = len(learn.opt.hypers), np.geomspace(1e-5, 1e-3, k).tolist()
    assert n > k
    learn.opt.set_hyper('lr', values)
    rates = [h['lr'] for h in learn.opt.hypers]
    assert (rates[0], rates[-1]) == (values[0], values[-1]) and rates == sorted(rates) and set(rates) == set(values)
    learn.opt.set_hyper('lr', [1.] * n)
    assert {h['lr'] for h in learn.opt.hypers} == {1.}
    with pytest.raises(AssertionError): learn.opt.set_hyper('lr', [1.] * (n + 1))


def test_groups_of_an_own_splitter_take_as_many_values_as_there_are_groups():
    learn = learner(splitter=lambda m: [[m[0].weight], [m[0].bias], [m[1].weight], [m[1].bias]])
    learn.create_opt()
    with pytest.raises(AssertionError): learn.opt.set_hyper('lr', [1., 2., 3.])


def test_nobody_else_writes_the_learning_rate():
    "In the source: the owner, and the optimizer when it is made"
    root, writes = Path(ftlib.__file__).parent, {}
    for path in root.rglob('*.py'):
        hits = re.findall(r"set_hypers?\((?:'lr'|lr=)|\[['\"]lr['\"]\]\s*[-+*/]?=[^=]", path.read_text())
        if hits: writes[path.relative_to(root).as_posix()] = len(hits)
    assert writes == {'lr/rates.py': 1, 'train/groups.py': 1}


@pytest.mark.parametrize('look', ['lr_find', 'validate', 'get_preds', 'fit_in_validate'])
@pytest.mark.parametrize('event', ['after_epoch', 'after_batch', 'before_validate'])
def test_a_look_from_a_callback_leaves_no_trace_in_the_history(look, event):
    "Losses, metrics and rates of the whole fit, the epoch of the look included"
    def once(cb):
        if cb.epoch != 1 or getattr(cb, 'looked', False) or cb.learn.training is None: return
        cb.looked = True
        if look == 'lr_find': cb.learn.lr_find(num_it=12, show_plot=False)
        elif look == 'fit_in_validate': cb.learn.validate(cbs=ReduceLROnPlateau(patience=1))
        else: getattr(cb.learn, look)()
    def run(cb):
        learn = learner(metrics=[torch.nn.functional.l1_loss,
                                 ftlib.AccumMetric(lambda p, t: (p - t).abs().max(), flatten=False)], seed=3)
        learn.recorder.train_metrics = True
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2, cbs=[cb])
        return learn.history.drop(columns='seconds'), learn.epoch_log.steps()
    for ours, plain in zip(run(Call(event, once)), run(Call('before_fit', lambda cb: None))):
        assert ours.shape == plain.shape
        np.testing.assert_array_equal(ours.to_numpy(dtype=float), plain.to_numpy(dtype=float))
