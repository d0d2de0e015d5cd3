//! Compiles the control and mesh contracts with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = |name| protox::compile([name], ["proto"]);
    // What both speak of is made once, and last: control's files hold it, too, and leave it empty.
    tonic_prost_build::configure()
        .build_transport(false)
        .extern_path(".palisade.mesh.v1", "crate::pb::mesh")
        .compile_fds(files("proto/control.proto")?)?;
    tonic_prost_build::configure().build_transport(false).compile_fds(files("proto/mesh.proto")?)?;
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}
