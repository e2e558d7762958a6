//! The engine's optimizer behind its lock, shared between `Engine` and the parameters on its device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::ThreadId;

use roptim::tensor::RawTensor;
use roptim::{Error, ErrorKind, Optimizer, TensorMut, TensorRef};

use crate::forks::{Shareable, was_looked_at};

/// What a call does when another thread is in the optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Haste {
    /// It is refused.
    Now,
    /// It waits: it belongs to a step under way, and the others are refused.
    Wait,
}

/// The engine's optimizer, shared with the parameters whose truth lies on its device. Holds no Python
/// object, so that no reference cycle goes through it.
pub(crate) struct Shared {
    pub(crate) name: &'static str,
    optimizer: Mutex<Optimizer>,
    /// The thread in a step that evaluates the loss several times; the optimizer is not locked meanwhile.
    minimizing: Mutex<Option<ThreadId>>,
}

impl Shareable for Shared {
    fn is_busy(&self) -> bool {
        self.optimizer.is_busy()
    }

    fn forked(&self) {
        let minimizing = *self.minimizing();
        if minimizing.is_some_and(|thread| thread != std::thread::current().id()) {
            // Nobody will end that step. Its parameters are where it last evaluated.
            *self.minimizing() = None;
            let _ = self.try_use().and_then(|mut optimizer| optimizer.abandon(None));
        }
    }
}

impl Shared {
    pub(crate) fn new(optimizer: Optimizer) -> Self {
        Self { name: optimizer.preset().name, optimizer: Mutex::new(optimizer), minimizing: Mutex::new(None) }
    }

    /// Who minimizes, for a moment.
    pub(crate) fn minimizing(&self) -> MutexGuard<'_, Option<ThreadId>> {
        self.minimizing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The optimizer, unless another thread is in it.
    pub(crate) fn try_use(&self) -> roptim::Result<MutexGuard<'_, Optimizer>> {
        let again = |taken| match taken {
            TryLockError::WouldBlock if was_looked_at() => self.optimizer.try_lock(),
            taken => Err(taken),
        };
        match self.optimizer.try_lock().or_else(again) {
            Ok(guard) => Ok(guard),
            // The torn flag inside, not the lock's poison, tells whether a panic left work half done.
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(self.busy()),
        }
    }

    /// The optimizer, at once or not. Who waits may hold the interpreter lock: nobody asks for that lock while in
    /// the optimizer.
    pub(crate) fn in_haste(&self, haste: Haste) -> roptim::Result<MutexGuard<'_, Optimizer>> {
        match haste {
            Haste::Now => self.try_use(),
            Haste::Wait => Ok(self.wait()),
        }
    }

    pub(crate) fn busy(&self) -> Error {
        Error::plain(ErrorKind::Concurrent, format!("{}: another thread is using this optimizer", self.name))
            .with_remedy("call it from one thread at a time")
    }

    /// The optimizer, when other threads are done with it.
    pub(crate) fn wait(&self) -> MutexGuard<'_, Optimizer> {
        self.optimizer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn host_is_stale(&self, index: usize) -> bool {
        self.wait().host_is_stale(index)
    }

    pub(crate) fn host_written(&self, index: usize) {
        self.wait().host_written(index);
    }

    /// Brings a parameter's values from the device to the array behind `raw`, if they are ahead there, and calls `then`
    /// before anybody else gets the optimizer.
    pub(crate) fn brought_home<T>(&self, index: usize, raw: &RawTensor, then: impl FnOnce() -> T) -> roptim::Result<T> {
        let mut optimizer = self.wait();
        if optimizer.host_is_stale(index) {
            // SAFETY: the caller looked at the array just now and holds a reference to it.
            let mut target = unsafe { TensorMut::from_raw(raw.clone()) };
            optimizer.sync(&mut [(index, &mut target)])?;
        }
        Ok(then())
    }

    /// Brings a parameter's values from the device to the array behind `raw`.
    pub(crate) fn sync(&self, index: usize, raw: &RawTensor) -> roptim::Result<()> {
        // SAFETY: the caller looked at the array just now and holds a reference to it.
        let mut target = unsafe { TensorMut::from_raw(raw.clone()) };
        self.wait().sync(&mut [(index, &mut target)])
    }
}

/// A number that tells an array's values from others.
pub(crate) fn fingerprint(raw: &RawTensor) -> u64 {
    // SAFETY: the caller looked at the array just now and holds a reference to it.
    roptim::cpu::fingerprint(&unsafe { TensorRef::from_raw(raw.clone()) })
}

/// The optimizer on whose device a parameter's truth lies, and the parameter's index there.
#[derive(Clone)]
pub(crate) struct Home {
    pub(crate) shared: Arc<Shared>,
    pub(crate) index: usize,
}

impl Home {
    /// Whether it is the same one.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.is_of(&other.shared, other.index)
    }

    /// Whether it is this parameter of this optimizer.
    pub(crate) fn is_of(&self, shared: &Arc<Shared>, index: usize) -> bool {
        self.index == index && Arc::ptr_eq(&self.shared, shared)
    }
}
