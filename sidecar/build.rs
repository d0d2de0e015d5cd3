//! Compiles the contracts of others with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = protox::compile(["proto/ext_authz.proto", "proto/otlp.proto"], ["proto"])?;
    tonic_prost_build::configure().build_transport(false).compile_fds(files)?;
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}
