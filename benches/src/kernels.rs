//! The guest kernel, with its testbed and without.

use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use vmm::boot::{KernelImage, KernelImageError, kernel_rustflags};

/// Which build of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Build {
    /// With the testbed: the one that is embedded in `stalemate`.
    Testbed,
    /// Without the feature `testbed`: the one for measuring the MM stack itself.
    Bare,
    /// As `Bare`, from sources in which no event, point or failpoint is written at all: the macros that
    /// stand for them expand to nothing (`--cfg testbed_absent`), so their arguments are not even parsed as
    /// expressions.
    Absent,
}

/// A kernel that cannot be built or read.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Cargo cannot be run.
    #[error("cannot run {}", .cargo.display())]
    Cargo {
        /// Its path.
        cargo: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The build failed.
    #[error(
        "the build of the {build:?} kernel ended with {status}; the compiler's messages are above"
    )]
    Failed {
        /// Which.
        build: Build,
        /// How cargo ended.
        status: ExitStatus,
    },
    /// The ELF file cannot be read.
    #[error(transparent)]
    Image(#[from] KernelImageError),
}

impl Build {
    /// The ELF file; what is not embedded is built below `target_dir` with the same flags.
    ///
    /// # Errors
    /// It cannot be built or read.
    pub fn elf(self, target_dir: &Path) -> Result<Vec<u8>, BuildError> {
        let image = match self {
            Self::Testbed => KernelImage::Embedded,
            Self::Bare => KernelImage::File(self.build("", &target_dir.join("bare"))?),
            Self::Absent => {
                // What only events use is unused here.
                let flags = "--cfg=testbed_absent\x1f-Aunused\x1f";
                KernelImage::File(self.build(flags, &target_dir.join("absent"))?)
            }
        };
        Ok(image.bytes()?.into_owned())
    }

    fn build(self, more_flags: &str, target_dir: &Path) -> Result<PathBuf, BuildError> {
        const TARGET: &str = "x86_64-unknown-linux-gnu";
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let cargo = env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from);
        let mut command = Command::new(&cargo);
        // What the outer cargo has told this process is about host programs.
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CARGO") && text != "CARGO_HOME" || text.starts_with("RUSTFLAGS") {
                command.env_remove(&name);
            }
        }
        command
            .env(
                "CARGO_ENCODED_RUSTFLAGS",
                format!("{more_flags}{}", kernel_rustflags()),
            )
            .current_dir(root)
            .args(["build", "--quiet", "--package", "stalemate-guest-kernel"])
            .args(["--bin", "stalemate-kernel", "--features", "image"])
            .args(["--no-default-features", "--profile", "image"])
            .args(["--target", TARGET, "--target-dir"])
            .arg(target_dir)
            .args(["--locked", "--offline"])
            .stdout(Stdio::null());
        match command.status() {
            Ok(status) if status.success() => {
                Ok(target_dir.join(TARGET).join("image/stalemate-kernel"))
            }
            Ok(status) => Err(BuildError::Failed {
                build: self,
                status,
            }),
            Err(source) => Err(BuildError::Cargo { cargo, source }),
        }
    }
}
