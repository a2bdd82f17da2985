//! Builds the two images that the machine runs, the kernel and the user programs, and tells the library
//! where they are: `STALEMATE_KERNEL_ELF` and `STALEMATE_USER_ELF`, for `include_bytes!`.
//!
//! A nested cargo builds them, each with its own flags, for the host's target: nothing but a stable
//! toolchain is needed. Both keep their symbols and debug information, for backtraces.

use std::ffi::{OsStr, OsString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio, exit};
use std::{env, fs};

use sha2::{Digest as _, Sha256};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROFILE: &str = "image";

/// Flags of both images.
const COMMON_FLAGS: &[&str] = &[
    // Linked at fixed addresses; nobody relocates them.
    "-Crelocation-model=static",
    // No SSE: the kernel saves no such registers, and a host that emulates CPL 0 has none there. The
    // distributed `core` is regenerated without it because the profile `image` has fat LTO. rustc
    // warns that this may become an error one day; then the target has to become a built-in one
    // without SSE, x86_64-unknown-none.
    "-Ctarget-feature=-sse,-sse2,-sse3,-ssse3,-sse4.1,-sse4.2,-avx,-avx2",
    // The host unwinds the guest by its frame pointers, so that tables would be dead weight.
    "-Cforce-frame-pointers=yes",
    "-Cforce-unwind-tables=no",
    // No C library, no start files, no dynamic linker.
    "-Clink-arg=-nostdlib",
    "-Clink-arg=-nostartfiles",
    "-Clink-arg=-static",
    // Only the segments that the linker script names.
    "-Clink-arg=-Wl,--build-id=none",
    "-Clink-arg=-Wl,-z,noexecstack,-z,norelro,-z,max-page-size=4096",
];

struct Image {
    package: &'static str,
    binary: &'static str,
    /// From the workspace's root.
    linker_script: &'static str,
    flags: &'static [&'static str],
    /// Environment variable that holds the finished file's path when the library is compiled.
    variable: &'static str,
}

const IMAGES: [Image; 2] = [
    Image {
        package: "stalemate-guest-kernel",
        binary: "stalemate-kernel",
        linker_script: "guest-kernel/image.ld",
        flags: &[
            // In the top 2 GiB of the address space.
            "-Ccode-model=kernel",
            // An exception at CPL 0 pushes its frame where a red zone would be. Functions from `core`
            // may keep one all the same: `guest_kernel::arch::x86_64` says why that is safe.
            "-Cno-redzone=yes",
        ],
        variable: "STALEMATE_KERNEL_ELF",
    },
    Image {
        package: "stalemate-guest",
        binary: "stalemate-user",
        linker_script: "guest/image.ld",
        flags: &[],
        variable: "STALEMATE_USER_ELF",
    },
];

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("vmm lies in the workspace");
    for input in ["guest", "guest-kernel", "Cargo.toml", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={}", root.join(input).display());
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!(
        "cargo:rustc-env=STALEMATE_KERNEL_HASH={}",
        source_hash(root)
    );
    // One directory for both: what they share for the host (procedural macros) is built once.
    let target_dir = PathBuf::from(variable("OUT_DIR")).join("images");
    for image in &IMAGES {
        let file = image.build(root, &target_dir);
        println!("cargo:rustc-env={}={}", image.variable, file.display());
    }
    // For whoever builds another kernel to compare with (benches/).
    let flags = IMAGES[0].rustflags(root);
    let flags = flags
        .to_str()
        .unwrap_or_else(|| fail("the workspace's path is not UTF-8"));
    println!("cargo:rustc-env=STALEMATE_KERNEL_RUSTFLAGS={flags}");
}

/// SHA-256 over the sources of the kernel, the programs and their contract: what decides where scheduling
/// points are passed. The sources and not the images, because both engines run them, and because the same
/// sources pass the same points whatever compiled them. Tests do not count.
fn source_hash(root: &Path) -> String {
    let mut files = Vec::new();
    for directory in ["guest-kernel/abi/src", "guest-kernel/src", "guest/src"] {
        sources(&root.join(directory), &mut files);
    }
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let name = file.strip_prefix(root).expect("found below the root");
        let text = fs::read(&file)
            .unwrap_or_else(|error| fail(&format!("{} cannot be read: {error}", file.display())));
        hash.update(name.as_os_str().as_encoded_bytes());
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(&text);
    }
    let digest = hash.finalize();
    digest[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(directory)
        .unwrap_or_else(|error| fail(&format!("{} cannot be read: {error}", directory.display())));
    for entry in entries.flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if name == "tests" || name == "testing" || name == "tests.rs" {
            continue;
        }
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

impl Image {
    fn build(&self, root: &Path, target_dir: &Path) -> PathBuf {
        let mut cargo = Command::new(variable("CARGO"));
        forget_outer_build(&mut cargo);
        cargo
            .env("CARGO_ENCODED_RUSTFLAGS", self.rustflags(root))
            .current_dir(root)
            .args(["build", "--package", self.package, "--bin", self.binary])
            .args([
                "--features",
                "image",
                "--profile",
                PROFILE,
                "--target",
                TARGET,
            ])
            .arg("--target-dir")
            .arg(target_dir)
            // The outer build has resolved and fetched everything that this one needs.
            .args(["--locked", "--offline"])
            // Standard output is where cargo reads this script's instructions.
            .stdout(Stdio::null());
        match cargo.status() {
            Ok(status) if status.success() => {}
            Ok(status) => fail(&format!("the build of {} ended with {status}", self.binary)),
            Err(error) => fail(&format!("{:?} cannot be run: {error}", cargo.get_program())),
        }
        target_dir.join(TARGET).join(PROFILE).join(self.binary)
    }

    /// The flags, separated as cargo wants them: a path may contain blanks.
    fn rustflags(&self, root: &Path) -> OsString {
        let script = root.join(self.linker_script);
        let contents = fs::read(&script)
            .unwrap_or_else(|error| fail(&format!("{} cannot be read: {error}", script.display())));
        let mut hasher = DefaultHasher::new();
        contents.hash(&mut hasher);
        // A `cfg` that nobody asks for: the nested cargo watches flags, not linker scripts.
        let version = format!("--cfg=linker_script_{:x}", hasher.finish());
        let mut link = OsString::from("-Clink-arg=-T");
        link.push(script);
        let flags = COMMON_FLAGS.iter().chain(self.flags).map(OsStr::new);
        let flags: Vec<&OsStr> = flags
            .chain([link.as_os_str(), OsStr::new(&version)])
            .collect();
        flags.join(OsStr::new("\x1f"))
    }
}

/// Drops what the outer cargo has told this script and rustc: with its flags, wrappers and target
/// directory the images would be built like host programs. The job server stays, so that both builds
/// together keep to the number of jobs that was asked for.
fn forget_outer_build(cargo: &mut Command) {
    const KEPT: [&str; 2] = ["CARGO_HOME", "CARGO_MAKEFLAGS"];
    const FORGOTTEN: [&str; 5] = [
        "RUSTFLAGS",
        "RUSTDOCFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_LINKER",
    ];
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if FORGOTTEN.contains(&&*text) || text.starts_with("CARGO") && !KEPT.contains(&&*text) {
            cargo.env_remove(&name);
        }
    }
}

fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| fail(&format!("cargo has not set {name}")))
}

fn fail(why: &str) -> ! {
    eprintln!("vmm/build.rs: {why}; the compiler's messages are above");
    exit(1)
}
