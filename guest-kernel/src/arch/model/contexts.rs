//! Coroutines: one for each kernel stack and each CPU's idle loop.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::string::{String, ToString};
use std::vec::Vec;

use abi::channel::Doorbell;
use abi::objects::UserFrame;
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};

/// Bytes of a coroutine's stack; unused pages of it are never touched.
const STACK: usize = 256 << 10;

/// Why a CPU no longer runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pause {
    /// It goes on as another context; never seen outside.
    Switch(usize),
    /// The kernel rang the doorbell.
    Doorbell(Doorbell),
    /// It waits for an interrupt, and none is pending.
    Halted,
    /// The kernel has ended the machine.
    Exited(u32),
    /// The kernel panicked.
    Panicked(String),
}

type Routine = Coroutine<(), Pause, (), DefaultStack>;

struct Context {
    /// None while it runs.
    routine: Option<Routine>,
    yielder: *const Yielder<(), Pause>,
    frame: *mut UserFrame,
}

/// All contexts of a machine.
pub(super) struct Contexts {
    all: RefCell<Vec<Context>>,
    /// The context of each CPU.
    on: Vec<Cell<usize>>,
    /// The context that runs.
    running: Cell<usize>,
    stacks: RefCell<Vec<DefaultStack>>,
}

// SAFETY: one thread at a time drives a machine, and its coroutines run on that thread ([`super::Model`]).
unsafe impl Sync for Contexts {}
// SAFETY: as above; between two calls no coroutine runs, and what their stacks hold (references into the
// machine, addresses) is the same on every thread.
unsafe impl Send for Contexts {}

impl Contexts {
    pub(super) fn new(cpus: usize) -> Self {
        Self {
            all: RefCell::default(),
            on: (0..cpus).map(|_| Cell::new(usize::MAX)).collect(),
            running: Cell::new(usize::MAX),
            stacks: RefCell::default(),
        }
    }

    /// A new context that runs `body`, which must own nothing that needs to be dropped. Contexts are
    /// numbered in the order in which they are made.
    pub(super) fn add(&self, body: impl FnOnce() + 'static) -> usize {
        let number = self.all.borrow().len();
        let stack = self.stacks.borrow_mut().pop();
        let stack = stack.unwrap_or_else(|| DefaultStack::new(STACK).expect("memory for a stack"));
        let this: *const Self = self;
        let routine = Coroutine::with_stack(stack, move |yielder, ()| {
            // SAFETY: the contexts outlive the coroutines that they hold.
            let contexts = unsafe { &*this };
            contexts.all.borrow_mut()[number].yielder = yielder;
            body();
        });
        self.all.borrow_mut().push(Context {
            routine: Some(routine),
            yielder: std::ptr::null(),
            frame: std::ptr::null_mut(),
        });
        number
    }

    /// Puts `context` on `cpu`.
    pub(super) fn place(&self, cpu: usize, context: usize) {
        self.on[cpu].set(context);
    }
    /// The context of `cpu`.
    pub(super) fn on(&self, cpu: usize) -> usize {
        self.on[cpu].get()
    }

    /// Runs what is on `cpu` until it pauses.
    pub(super) fn resume(&self, cpu: usize) -> Pause {
        loop {
            let number = self.on[cpu].get();
            self.running.set(number);
            let routine = self.all.borrow_mut()[number].routine.take();
            let mut routine = routine.expect("a context that does not run");
            let result = catch_unwind(AssertUnwindSafe(|| routine.resume(())));
            self.all.borrow_mut()[number].routine = Some(routine);
            self.running.set(usize::MAX);
            match result {
                Ok(CoroutineResult::Yield(Pause::Switch(to))) => self.on[cpu].set(to),
                Ok(CoroutineResult::Yield(pause)) => return pause,
                Ok(CoroutineResult::Return(())) => {
                    return Pause::Panicked("a context has ended".into());
                }
                Err(payload) => return Pause::Panicked(text(payload.as_ref())),
            }
        }
    }

    /// True where kernel code that executes now is in no context: somebody calls it directly.
    #[cfg(test)]
    pub(super) fn idle(&self) -> bool {
        self.running.get() == usize::MAX
    }

    /// Stops the running context; returns when it is resumed.
    pub(super) fn pause(&self, pause: Pause) {
        let yielder = self.all.borrow()[self.running.get()].yielder;
        assert!(!yielder.is_null(), "nothing runs that could stop");
        // SAFETY: set by the running coroutine itself, on whose stack this executes.
        unsafe { &*yielder }.suspend(pause);
    }

    /// Notes where the running context keeps the registers of CPL 3.
    pub(super) fn set_user_frame(&self, frame: *mut UserFrame) {
        self.all.borrow_mut()[self.running.get()].frame = frame;
    }
    /// Where the running context keeps them.
    pub(super) fn user_frame(&self) -> *mut UserFrame {
        self.all.borrow()[self.running.get()].frame
    }

    /// Forgets all contexts and keeps their stacks.
    pub(super) fn clear(&self) {
        let mut stacks = self.stacks.borrow_mut();
        for mut context in self.all.borrow_mut().drain(..) {
            let Some(mut routine) = context.routine.take() else {
                continue;
            };
            if routine.started() && !routine.done() {
                // SAFETY: kernel and programs use no heap, and a body owns nothing that needs to be
                // dropped ([`Contexts::add`]), so nothing is lost with the frames.
                unsafe { routine.force_reset() };
            }
            if routine.done() {
                stacks.push(routine.into_stack());
            }
        }
    }
}

impl Drop for Contexts {
    fn drop(&mut self) {
        self.clear();
    }
}

fn text(payload: &(dyn std::any::Any + Send)) -> String {
    let owned = payload.downcast_ref::<String>().cloned();
    let text = owned.or_else(|| payload.downcast_ref::<&str>().map(ToString::to_string));
    text.unwrap_or_else(|| "a panic without a text".into())
}
