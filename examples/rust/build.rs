//! Says where libqmoe is: below QMOE_PREFIX, where `cmake --install` put it.
fn main() {
    println!("cargo:rerun-if-env-changed=QMOE_PREFIX");
    if let Ok(prefix) = std::env::var("QMOE_PREFIX") {
        println!("cargo:rustc-link-search=native={prefix}/lib");
        println!("cargo:rustc-link-arg=-Wl,-rpath,{prefix}/lib");
    }
    println!("cargo:rustc-link-lib=dylib=qmoe");
}
