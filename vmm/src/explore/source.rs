//! Where engines come from: a scenario, or a machine that was saved.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Driver, DriverError, Limits, Standing};
use crate::check::stream::Seen;
use crate::engine::kvm::KvmEngine;
use crate::engine::model::ModelEngine;
use crate::engine::{Engine, EngineKind, Window};
use crate::scenario::Scenario;
use crate::snapshot::{SavedMachine, Snapshot};

/// A machine at the start of its schedules.
#[derive(Clone, Debug)]
struct First {
    snapshot: Arc<Snapshot>,
    standing: Vec<Standing>,
    since_boot: Arc<[Seen]>,
}

/// Makes engines of one kind that stand at the start of one scenario's schedules. On vCPUs only the first
/// one boots: the others are clones of it.
#[derive(Debug)]
pub struct Source {
    kind: EngineKind,
    scenario: Scenario,
    window: Option<Window>,
    /// The machine that others are clones of, once there is one.
    first: Mutex<Option<First>>,
}

impl Source {
    /// Of `scenario`.
    #[must_use]
    pub fn new(kind: EngineKind, scenario: Scenario) -> Self {
        Self {
            kind,
            scenario,
            window: None,
            first: Mutex::new(None),
        }
    }

    /// With instructions as scheduling points.
    #[must_use]
    pub fn with_window(self, window: Option<Window>) -> Self {
        Self { window, ..self }
    }

    /// Where instructions are scheduling points.
    #[must_use]
    pub fn window(&self) -> Option<Window> {
        self.window
    }

    /// Clones of a machine that was saved.
    #[must_use]
    pub fn of_saved(saved: SavedMachine) -> Self {
        Self {
            kind: EngineKind::Kvm,
            scenario: saved.scenario,
            window: None,
            first: Mutex::new(Some(First {
                snapshot: saved.snapshot,
                standing: saved.standing,
                since_boot: Arc::default(),
            })),
        }
    }

    /// Which kind of engines.
    #[must_use]
    pub fn kind(&self) -> EngineKind {
        self.kind
    }

    /// What the engines run.
    #[must_use]
    pub fn scenario(&self) -> &Scenario {
        &self.scenario
    }

    /// An engine at the start of its schedules.
    ///
    /// # Errors
    /// There is none, or the program does not get there.
    pub fn driver(&self) -> Result<Driver<Box<dyn Engine>>, DriverError> {
        let mut driver = self.engine()?;
        if let Some(window) = self.window {
            driver.engine().set_window(window)?;
        }
        Ok(driver)
    }

    fn engine(&self) -> Result<Driver<Box<dyn Engine>>, DriverError> {
        let limits = Limits::default();
        if self.kind == EngineKind::Model {
            let engine = ModelEngine::new(&self.scenario)?;
            return Driver::new(Box::new(engine), limits, true);
        }
        // Held while the first one boots: the others wait for it and are clones of it.
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(it) = first.clone() {
            drop(first);
            let engine = Box::new(KvmEngine::clone_of(&self.scenario, it.snapshot)?);
            return Ok(Driver::resume(engine, limits, it.standing, it.since_boot));
        }
        let engine: Box<dyn Engine> = Box::new(KvmEngine::new(&self.scenario)?);
        let mut driver = Driver::new(engine, limits, true)?;
        let standing = driver.start_standing().to_vec();
        let since_boot = driver.since_boot();
        *first = driver.engine().snapshot().map(|snapshot| First {
            snapshot,
            standing,
            since_boot,
        });
        Ok(driver)
    }

    /// The machine at the start of its schedules, to be written to a file.
    ///
    /// # Errors
    /// As [`Source::driver`]; the model engine has nothing to save.
    pub fn save(&self) -> Result<SavedMachine, DriverError> {
        let mut driver = self.driver()?;
        let standing = driver.start_standing().to_vec();
        let snapshot = driver.engine().snapshot();
        Ok(SavedMachine {
            scenario: self.scenario.clone(),
            standing,
            snapshot: snapshot.ok_or_else(|| {
                crate::engine::EngineError::Unsupported(
                    "the model engine's coroutines cannot be saved: use --engine kvm".into(),
                )
            })?,
        })
    }
}
