//! The `stalemate` binary.

fn main() -> std::process::ExitCode {
    vmm::cli::main()
}
