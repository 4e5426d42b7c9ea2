//! What this example needs of `qmoe.h`, and owners for what it opens. No crate is needed.
use std::ffi::{c_char, c_int, c_uint, c_void, CStr, CString};
use std::fmt;
use std::marker::PhantomData;
use std::ptr;

/// Declared as in `qmoe.h`, in its order.
mod ffi {
    use super::*;

    #[repr(C)]
    pub struct Error {
        pub status: c_int,
        pub value: i64,
        pub field: [c_char; 24],
        pub expected: [c_char; 72],
        pub place: [c_char; 256],
    }

    #[repr(C)]
    pub struct ProjectionInfo {
        pub name: *const c_char,
        pub role: *const c_char,
        pub tensor: *const c_char,
        pub rows: u32,
        pub columns: u32,
    }

    pub const FLOAT32: c_int = 0;
    pub const MESSAGE_SIZE: usize = 512;

    extern "C" {
        pub fn qmoe_error_message(error: *const Error, message: *mut c_char, size: usize) -> *mut c_char;
        pub fn qmoe_matrix_rows(matrix: *const c_void) -> u32;
        pub fn qmoe_matrix_columns(matrix: *const c_void) -> u32;
        pub fn qmoe_matrix_matmul(
            matrix: *const c_void,
            x: *const c_void,
            dtype: c_int,
            tokens: u64,
            y: *mut f32,
            threads: c_uint,
            error: *mut Error,
        ) -> c_int;
        pub fn qmoe_model_open(
            path: *const c_char,
            options: c_uint,
            memory_limit: u64,
            model: *mut *mut c_void,
            error: *mut Error,
        ) -> c_int;
        pub fn qmoe_model_close(model: *mut c_void);
        pub fn qmoe_model_find_layer(
            model: *const c_void,
            prefix: *const c_char,
            layer: *mut usize,
            error: *mut Error,
        ) -> c_int;
        pub fn qmoe_model_projection(
            model: *const c_void,
            layer: usize,
            projection: u32,
            info: *mut ProjectionInfo,
            error: *mut Error,
        ) -> c_int;
        pub fn qmoe_expert_open(
            model: *const c_void,
            layer: usize,
            expert: u32,
            options: c_uint,
            result: *mut *mut c_void,
            error: *mut Error,
        ) -> c_int;
        pub fn qmoe_expert_close(expert: *mut c_void);
        pub fn qmoe_expert_matrix(expert: *const c_void, projection: u32) -> *const c_void;
    }
}

/// What the library says of a refusal, in one line.
#[derive(Debug)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// Calls a function of the library with room for an error.
fn call(function: impl FnOnce(*mut ffi::Error) -> c_int) -> Result<(), Error> {
    let mut error = std::mem::MaybeUninit::<ffi::Error>::zeroed();
    if function(error.as_mut_ptr()) == 0 {
        return Ok(());
    }
    let mut message = [0 as c_char; ffi::MESSAGE_SIZE];
    // SAFETY: the library has filled the error in, and ends the message with a zero.
    let text = unsafe {
        ffi::qmoe_error_message(error.as_ptr(), message.as_mut_ptr(), message.len());
        CStr::from_ptr(message.as_ptr())
    };
    Err(Error(text.to_string_lossy().into_owned()))
}

fn c_string(text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error(format!("{text:?}: a zero byte in a name")))
}

pub struct Model(*mut c_void);

// SAFETY: the library never changes an open model, and threads may share it.
unsafe impl Send for Model {}
unsafe impl Sync for Model {}

impl Model {
    pub fn open(path: &str) -> Result<Self, Error> {
        let path = c_string(path)?;
        let mut model = ptr::null_mut();
        call(|error| unsafe { ffi::qmoe_model_open(path.as_ptr(), 0, 0, &mut model, error) })?;
        Ok(Self(model))
    }

    pub fn find_layer(&self, prefix: &str) -> Result<usize, Error> {
        let prefix = c_string(prefix)?;
        let mut layer = 0;
        call(|error| unsafe { ffi::qmoe_model_find_layer(self.0, prefix.as_ptr(), &mut layer, error) })?;
        Ok(layer)
    }

    pub fn expert(&self, layer: usize, number: u32) -> Result<Expert<'_>, Error> {
        let mut expert = ptr::null_mut();
        call(|error| unsafe { ffi::qmoe_expert_open(self.0, layer, number, 0, &mut expert, error) })?;
        Ok(Expert { handle: expert, layer, model: self })
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: no expert outlives the model.
        unsafe { ffi::qmoe_model_close(self.0) }
    }
}

pub struct Expert<'a> {
    handle: *mut c_void,
    layer: usize,
    model: &'a Model,
}

impl Expert<'_> {
    /// The matrix for a role: "gate", "up" or "down".
    pub fn matrix(&self, role: &str) -> Result<Option<Matrix<'_>>, Error> {
        for number in 0.. {
            let matrix = unsafe { ffi::qmoe_expert_matrix(self.handle, number) };
            if matrix.is_null() {
                break;
            }
            let mut info = std::mem::MaybeUninit::<ffi::ProjectionInfo>::zeroed();
            call(|error| unsafe {
                ffi::qmoe_model_projection(self.model.0, self.layer, number, info.as_mut_ptr(), error)
            })?;
            // SAFETY: filled in, with strings that live as long as the model.
            let found = unsafe { CStr::from_ptr(info.assume_init().role) };
            if found.to_bytes() == role.as_bytes() {
                return Ok(Some(Matrix(matrix, PhantomData)));
            }
        }
        Ok(None)
    }
}

impl Drop for Expert<'_> {
    fn drop(&mut self) {
        // SAFETY: no matrix outlives the expert.
        unsafe { ffi::qmoe_expert_close(self.handle) }
    }
}

pub struct Matrix<'a>(*const c_void, PhantomData<&'a ()>);

impl Matrix<'_> {
    pub fn rows(&self) -> usize {
        unsafe { ffi::qmoe_matrix_rows(self.0) as usize }
    }

    pub fn columns(&self) -> usize {
        unsafe { ffi::qmoe_matrix_columns(self.0) as usize }
    }

    /// The matrix times one vector.
    pub fn product(&self, x: &[f32]) -> Result<Vec<f32>, Error> {
        if x.len() != self.columns() {
            return Err(Error(format!("{} columns do not fit {} inputs", self.columns(), x.len())));
        }
        let mut y = vec![0.0; self.rows()];
        call(|error| unsafe {
            ffi::qmoe_matrix_matmul(self.0, x.as_ptr().cast(), ffi::FLOAT32, 1, y.as_mut_ptr(), 2, error)
        })?;
        Ok(y)
    }
}
